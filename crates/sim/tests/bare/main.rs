//! The simulated engine, driven by a bare client over real sockets.

#![allow(clippy::unwrap_used)]

mod answers;
mod blocks;
mod control;
mod faults;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use bytes::Bytes;
use stator_sim::request::Sampling;
use stator_sim::wire::WireVersion;
use stator_sim::wire::msgpack::Value;
use stator_sim::{Config, Exit, Faults, Handle, Sim};
use support::{Frontend, Subscriber, add_fields, config, with_faults, with_wire};

/// Short enough to prove silence without waiting long: an engine without pace answers in
/// microseconds.
const SILENCE: Duration = Duration::from_millis(400);

async fn start(flags: &str) -> (Frontend, Handle) {
    start_with(flags, |config| config).await
}

async fn start_with(flags: &str, change: impl FnOnce(Config) -> Config) -> (Frontend, Handle) {
    let mut frontend = Frontend::bind().await;
    let engine = Sim::spawn(change(config(frontend.port, flags)));
    assert_eq!(frontend.greet().await, ["HELLO", "READY"]);
    (frontend, engine)
}

/// What the model says, computed without an engine.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let model = config(1, "").model;
    let mut chain = model.start(None).extend_all(prompt);
    let mut output = Vec::new();
    for _ in 0..count {
        output.push(model.next(chain, &Sampling::default(), &output));
        chain = chain.extend(output[output.len() - 1]);
    }
    output
}
