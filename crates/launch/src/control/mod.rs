//! How other commands speak to a running `stator up`: over a Unix socket in the topology's folder, which is its user's
//! alone.
//!
//! One request per connection, then replies until the launcher closes it; each a line of JSON.

mod client;
mod server;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stator_common::card::Role;

pub(crate) use client::{Connection, connect};
pub(crate) use server::{Asked, Control, Replies};

/// What a launcher can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Have so many workers of each role that is named.
    Scale {
        counts: Vec<(Role, u16)>,
        /// Whether replies go on until that is so.
        wait: bool,
    },
    /// Drain, or, `now`, end without.
    Down { now: bool },
}

/// What a launcher answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// For a person; more follows.
    Said(String),
    /// It is done. The last reply.
    Done,
    /// It was not done, for this reason. The last reply.
    Refused(String),
}

/// Returns the socket of the topology with this folder.
fn socket(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}
