//! The OpenAI API over a processor in process, with a worker on the real request plane whose every
//! delta a test writes itself.

mod chat;
mod completions;
mod failures;
mod meaning;
mod refusals;
mod script;
#[path = "../front/support.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "made for the tests of another program"
)]
mod support;
mod tokenizer;
