//! The decode role: what `stator-decode` does to a request.

mod plan;

pub use plan::Decode;
