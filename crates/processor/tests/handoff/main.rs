//! Requests through prefill and decode workers, each played by the test: what every worker is asked, in which
//! order, and what is asked of others when one fails.

mod chain;
mod failures;
mod ids;
mod leaving;
mod queue;
mod stage;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "some of it is for the tests of the front alone")]
mod support;
