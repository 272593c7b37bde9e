//! The OpenAI API over a processor in process, with a worker on the real request plane whose every
//! delta a test writes itself.

mod blame;
mod chat;
mod completions;
mod failures;
mod meaning;
mod refusals;
mod stage;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "some of it is for the tests of the front alone")]
mod support;
mod tokenizer;
