//! Which worker serves a request: a pure decision over a snapshot, with its reasons.
//!
//! A caller lists the [`Candidate`]s (a worker, or one data-parallel rank of it, with what is booked
//! on it), asks [`Router::choose`], and books the request with [`Ledger::book`] before it lets go of
//! the router, so that the next decision sees this one. Where prefill and decode are different workers,
//! [`Conditional`] says whether a prompt is worth that. No I/O, no clock; randomness comes from
//! a seed.

mod conditional;
mod decide;
pub mod hash;
pub mod index;
mod load;
mod prompt;

pub use conditional::{Bounds, Conditional, Line, Measured, Place, Situation, Why};
pub use decide::{Candidate, Choice, Measure, NoCandidates, Policy, Reason, Router};
pub use hash::BlockHash;
pub use load::{Booking, Ledger, Load};
pub use prompt::{Prompt, TokenPrompt};
