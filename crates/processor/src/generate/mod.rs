//! From attempts at workers to the pieces of an answer.
//!
//! [`Generation`] drives all choices of a request, whoever polls it: a handler that collects the whole
//! answer, or the body of a stream. There is no task and no channel in between, so dropping the handler or
//! the body (the client went away) drops the attempts, which cancels them in the engine.

mod choice;
mod collect;
mod stream;

pub(crate) use choice::{Choice, Finish, Generation, Piece, Reason, Stop};
pub(crate) use collect::{Collected, cached, collect};
pub(crate) use stream::{Format, sse};
