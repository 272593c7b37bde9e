//! What things are called, as types that cannot be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A request as its client knows it (`chatcmpl-...`, or the client's own `x-request-id`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub String);

/// A worker process, from its registration to its end. A restarted worker gets a new one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub String);

/// The content hash of a file that a worker serves (tokenizer, chat template): blake3, lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlobHash(pub String);

macro_rules! display_as_inner {
    ($($id:ident),*) => {$(
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
display_as_inner!(RequestId, WorkerId, BlobHash);
