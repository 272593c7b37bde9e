//! Which worker serves a request: a pure decision over a snapshot, with its reasons.
//!
//! [`Caches`] know which target holds how much of a prompt: by the targets' own word ([`index`]) or learned from
//! what was sent to them ([`approx`]). A caller lists the [`Candidate`]s (a worker, or one data-parallel rank of it,
//! with what is booked on it and what it has cached), asks [`Router::choose`], and books the request with
//! [`Ledger::book`] before it lets go of the router, so that the next decision sees this one; what other processors
//! booked is theirs to say ([`peers`]). Where prefill and
//! decode are different workers, [`Conditional`] says whether a prompt is worth that, and a [`backlog::Backlog`] which
//! of the prompts that wait a free target takes. No I/O, no clock; randomness comes from a seed.

pub mod approx;
pub mod backlog;
mod caches;
mod conditional;
mod cost;
mod decide;
mod drift;
pub mod hash;
pub mod index;
mod load;
pub mod peers;
mod sessions;

pub use caches::{Caches, Medium, Overlap, Overlaps, Source};
pub use conditional::{Bounds, Conditional, Cost, Line, Measured, Situation, Verdict, Why};
pub use cost::{Cached, DECODING, Room, Terms, Weights};
pub use decide::{Candidate, Choice, Measure, NoCandidates, Policy, Reason, Router, terms};
pub use drift::Drift;
pub use hash::BlockHash;
pub use load::{Booking, Ledger, Load, Share, Told};
pub use sessions::Sessions;
