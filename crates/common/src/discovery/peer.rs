//! How processors find each other: a record each, beside the cards of workers.

use serde::{Deserialize, Serialize};

use crate::card::Relay;

/// A processor, as others find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, another one in each of its lives.
    pub name: String,
    /// Name of the network that it is in (`process::network`): elsewhere a loopback address means somebody else.
    pub host: String,
    /// Where it tells what it has booked (`proto/stator/router/v1`).
    pub events: Relay,
}
