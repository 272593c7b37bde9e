//! Between engines and those who want to know what their caches hold.
//!
//! A [`Relay`] listens to engines' KV events, keeps a [`View`] of each, and tells it on: changes as numbered batches, all
//! of it to whoever asks (`stator.kv.v1`; order and repair in `proto/README.md`). What comes in are copies of blocks
//! by the engine's names, with their tokens; what goes out are blocks by the names that routers compute.
//!
//! The way of an event: `keeper` hears it, [`Order`] says whether it is the next one, [`View`] counts copies, [`Outbox`]
//! makes batches of what changes, `hub` publishes them. [`Mirror`] is all of that but sockets and clock. [`node`] finds the
//! engines of a machine; a worker that has a relay of its own tells it where its engines are.

pub mod config;
mod hub;
mod keeper;
mod metrics;
mod mirror;
pub mod node;
mod order;
mod outbox;
mod relay;
mod system;
mod view;

pub use mirror::{Mirror, Notice, Pending};
pub use order::{Order, Verdict};
pub use outbox::Outbox;
pub use relay::{Place, Relay, RelayError};
pub use view::View;
