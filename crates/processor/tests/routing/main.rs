//! Where requests go, as workers and a relay that each test plays see it.

#![allow(clippy::unwrap_used)]

mod adapters;
mod caches;
mod explained;
mod peers;
mod stage;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "some of it is for the tests of the front alone")]
mod support;
mod wishes;
