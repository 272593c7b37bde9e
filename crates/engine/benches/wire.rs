//! Time per message of the engine's wire: `cargo bench -p stator-engine`.
//!
//! The costs to hold are per token (ARCHITECTURE.md), so each line also says what one is.

use std::{hint::black_box, time::Instant};

use bytes::Bytes;
use serde_json::Value;
use stator_engine::{
    Request, RequestKey, Sampling, Tokens,
    schema::{Schema, Untested},
    validate::{self, Limits},
    wire::{AddContext, Codec},
};

/// Runs of one measurement, and measurements of which the fastest counts: the least disturbed.
const RUNS: u32 = 200;
const MEASUREMENTS: u32 = 500;

fn measure(what: &str, tokens: usize, mut run: impl FnMut()) {
    let best = (0..MEASUREMENTS).map(|_| {
        let start = Instant::now();
        (0..RUNS).for_each(|_| run());
        start.elapsed().as_secs_f64() / f64::from(RUNS)
    });
    let nanoseconds = best.fold(f64::INFINITY, f64::min) * 1e9;
    println!(
        "{what:45} {nanoseconds:9.0} ns {:7.1} ns/token",
        nanoseconds / tokens as f64
    );
}

fn golden(name: &str) -> Vec<Bytes> {
    let text = include_str!("../tests/golden/v0_33/outputs.json");
    let golden: Value = serde_json::from_str(text).expect("JSON");
    let frames = golden["outputs"][name]["frames"]
        .as_array()
        .expect("frames");
    let frame = |frame: &Value| {
        let text = frame.as_str().expect("hex");
        let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hex");
        (0..text.len()).step_by(2).map(byte).collect()
    };
    frames.iter().map(frame).collect()
}

fn main() {
    let schema = Schema::built_in("0.33.0", Untested::Refuse).expect("supported");
    let codec = Codec::new(&schema).expect("complete");
    for (name, tokens) in [
        ("one token", 1),
        ("sixteen streams", 16),
        ("statistics alone", 1),
        ("log-probabilities in frames", 4),
    ] {
        let frames = golden(name);
        measure(&format!("decode: {name}"), tokens, || {
            let read = codec.decode_outputs(black_box(&frames), RequestKey::of_engine_id);
            black_box(read.expect("valid"));
        });
    }
    let limits = Limits::new(152_000, 131_072);
    for tokens in [20usize, 2_000, 60_000] {
        let ids: Vec<u32> = (0..tokens as u32).map(|id| id * 7 % 152_000).collect();
        let request = Request {
            id: "cmpl-1".into(),
            prompt: Tokens::from(ids.as_slice()),
            sampling: Sampling {
                max_tokens: 16,
                temperature: Some(0.7),
                ..Sampling::default()
            },
            ..Request::default()
        };
        let context = AddContext {
            engine_id: "cmpl-1-00000001",
            client_index: 0,
            arrival_time: 1.0,
            wave: 0,
        };
        measure(
            &format!("check and encode: {tokens} tokens"),
            tokens,
            || {
                let checked = validate::check(black_box(request.clone()), &limits).expect("valid");
                black_box(codec.encode_add(&checked, context));
            },
        );
    }
}
