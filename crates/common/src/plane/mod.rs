//! How requests reach workers and outputs come back, whatever carries them.
//!
//! A processor has a [`Client`] per worker, a worker a [`Server`] with a [`Handler`] behind it. Requests and outputs
//! are the messages of `proto/stator/worker/v1`; what travels is told in `proto/README.md`. Two planes carry it,
//! both over whatever [`net`] makes of an [`Address`]: [`tcp`], frames on one connection per processor-worker pair, and
//! `http`, gRPC for everybody. What carries the frames may also be the messages of a NATS server ([`nats`]).
//!
//! [`delta`] is what coalescing means, [`stream`] where a request's deltas wait for their reader.

mod address;
mod client;
pub mod delta;
mod http;
pub mod nats;
pub mod net;
mod server;
pub mod stream;
pub mod tcp;
mod tls;

use std::time::Duration;

pub(crate) use address::is_subject;
pub use address::{Address, AddressError};
pub use client::{Client, ClientConfig, State, Unclaimed};
pub use server::{BindError, Connection, Handler, Server, ServerConfig, ServerHandle};
pub use stream::DeltaStream;

use crate::{Code, ids::BlobHash, proto::worker};

/// How often the dialling side sends a ping. Three of them fit into [`DEAD_AFTER`].
pub const PING_EVERY: Duration = Duration::from_secs(5);

/// A peer that was not heard of for this long is dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(15);

/// What a peer calls itself in Hello and Welcome.
pub(crate) const SOFTWARE: &str = concat!("stator ", env!("CARGO_PKG_VERSION"));

/// Why the plane could not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PlaneError {
    /// There is no connection right now; the client keeps trying by itself.
    #[error("not connected to the worker at {address}: {reason}")]
    NotConnected { address: String, reason: String },
    /// There was a connection, and it was lost.
    #[error("connection to the worker at {address} lost: {reason}")]
    Disconnected { address: String, reason: String },
    /// The worker takes nothing new.
    #[error("the worker at {address} is draining")]
    Draining { address: String },
    /// The worker refused the connection, for good.
    #[error("the worker at {address} refused the connection: {message}")]
    Refused {
        address: String,
        code: Code,
        message: String,
    },
    /// The request does not fit into a frame.
    #[error("a request of {size} bytes is larger than a frame may be ({limit})")]
    TooLarge { size: usize, limit: usize },
    /// So much waits to be written to this worker that nothing is added.
    #[error(
        "{queued} bytes already wait to be sent to the worker at {address}, the limit is {limit}"
    )]
    Backlog {
        address: String,
        queued: usize,
        limit: usize,
    },
    /// The worker has no file of this content.
    #[error("the worker at {address} has no blob {hash}")]
    NoBlob { address: String, hash: BlobHash },
    /// The worker sent other bytes than asked for.
    #[error("the worker at {address} sent other bytes for blob {hash}")]
    WrongBlob { address: String, hash: BlobHash },
}

impl PlaneError {
    /// Returns what this means for the request.
    pub fn code(&self) -> Code {
        match self {
            Self::NotConnected { .. } => Code::Unavailable,
            Self::Disconnected { .. } => Code::Disconnected,
            Self::Draining { .. } => Code::Draining,
            Self::Refused { code, .. } => *code,
            Self::TooLarge { .. } => Code::TooLarge,
            Self::Backlog { .. } => Code::Overloaded,
            Self::NoBlob { .. } => Code::NotFound,
            Self::WrongBlob { .. } => Code::Internal,
        }
    }
}

/// Builds the wire form of an error.
pub(crate) fn error(code: Code, message: impl Into<String>) -> worker::Error {
    worker::Error {
        code: worker::Code::from(code).into(),
        message: message.into(),
        field: String::new(),
        untouched: false,
    }
}

#[cfg(test)]
mod tests;
