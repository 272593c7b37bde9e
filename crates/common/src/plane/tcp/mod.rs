//! The tcp request plane: one connection per processor-worker pair carries everything.
//!
//! The protocol is told in `proto/README.md`. In code: [`frame`] is the bytes, `inbound` the way
//! in of a byte stream, `outbound` the way out without a task in between, `server` the worker's end, `client` the
//! processor's. Byte streams come from [`net`](super::net): nothing here knows whether it is a socket.
//!
//! Why not HTTP/2 or a message queue: an engine step produces a few bytes for each of hundreds of streams
//! at once. Here that is one frame, one write and one read, whatever the number of streams.

pub(super) mod client;
pub mod frame;
mod inbound;
mod outbound;
pub(super) mod server;
#[cfg(test)]
mod tests;
