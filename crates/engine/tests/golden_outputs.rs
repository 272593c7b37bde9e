//! What vLLM's own encoder wrote is what we read: golden vectors of two releases, each message
//! also with fields that a later release might add and without those that an older one lacks.

use bytes::Bytes;
use serde_json::{Map, Value, json};
use stator_engine::{
    Batch, Finish, Logprobs, Message, Output, RequestKey,
    schema::{Schema, Untested},
    wire::{self, Codec, ENGINE_CORE_DEAD, Status},
};

const RELEASES: [(&str, &str); 2] = [
    ("0.32.0", include_str!("golden/v0_32/outputs.json")),
    ("0.33.0", include_str!("golden/v0_33/outputs.json")),
];

fn codec(version: &str) -> Codec {
    let schema = Schema::built_in(version, Untested::Refuse).expect("supported");
    Codec::new(&schema).expect("complete")
}

fn golden(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

fn unhex(value: &Value) -> Bytes {
    let text = value.as_str().expect("hex").as_bytes();
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).expect("hex");
        u8::from_str_radix(pair, 16).expect("hex")
    };
    text.chunks(2).map(byte).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn frames(case: &Value) -> Vec<Bytes> {
    case["frames"]
        .as_array()
        .expect("frames")
        .iter()
        .map(unhex)
        .collect()
}

fn decode(codec: &Codec, frames: &[Bytes]) -> Batch {
    match codec.decode_outputs(frames, RequestKey::of_engine_id) {
        Ok(Message::Batch(batch)) => batch,
        other => panic!("{other:?}"),
    }
}

/// A batch in the terms of `scripts/golden.py`: what is absent is not there.
fn described(batch: &Batch) -> Value {
    let mut found = Map::new();
    found.insert("outputs".into(), batch.outputs.iter().map(output).collect());
    if batch.engine_index != 0 {
        found.insert("engine_index".into(), batch.engine_index.into());
    }
    if let Some(stats) = &batch.stats {
        let stats = json!({
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_usage": stats.kv_usage,
            "prefix_queries": stats.prefix_queries,
            "prefix_hits": stats.prefix_hits,
            "preempted": stats.preempted,
        });
        found.insert("stats".into(), stats);
    }
    if let Some(utility) = &batch.utility {
        let utility = match &utility.result {
            Ok(result) => json!({"call_id": utility.call_id, "result": result}),
            Err(failure) => json!({"call_id": utility.call_id, "failure": failure}),
        };
        found.insert("utility".into(), utility);
    }
    found.into()
}

fn output(output: &Output) -> Value {
    let mut found = Map::new();
    found.insert("key".into(), output.key.0.into());
    found.insert("tokens".into(), json!(output.tokens.to_vec()));
    let optional = [
        ("logprobs", output.logprobs.as_deref().map(logprobs)),
        (
            "prompt_logprobs",
            output.prompt_logprobs.as_deref().map(logprobs),
        ),
        (
            "finish",
            output.finish.map(|finish| finish_name(finish).into()),
        ),
        ("stop_token", output.stop_token.map(Value::from)),
        ("cached_tokens", output.cached_tokens.map(Value::from)),
        (
            "kv_transfer_params",
            output
                .kv_transfer_params
                .as_deref()
                .map(|raw| hex(raw).into()),
        ),
        (
            "error",
            output.error.as_deref().map(|error| {
                json!({
                    "code": error.code,
                    "message": error.message,
                    "retryable": error.retryable,
                })
            }),
        ),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            found.insert(name.into(), value);
        }
    }
    found.into()
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "STOP",
        Finish::Length => "LENGTH",
        Finish::Abort => "ABORT",
        Finish::Error => "ERROR",
        Finish::Repetition => "REPETITION",
    }
}

fn logprobs(logprobs: &Logprobs) -> Value {
    let values: Vec<_> = logprobs
        .values
        .iter()
        .map(|value| f64::from(*value))
        .collect();
    json!({
        // A matrix without rows has no width that anybody could see.
        "width": if logprobs.rows() == 0 { 2 } else { logprobs.width },
        "tokens": logprobs.tokens,
        "values": values,
        "ranks": logprobs.ranks,
    })
}

#[test]
fn every_message_that_vllm_wrote_is_read_as_it_was_meant() {
    for (version, text) in RELEASES {
        let codec = codec(version);
        let golden = golden(text);
        let cases = golden["outputs"].as_object().expect("cases");
        assert!(cases.len() > 60, "{version}: {}", cases.len());
        for (name, case) in cases {
            let batch = decode(&codec, &frames(case));
            // Compared as text: -0.0 and 0.0 differ, and so do 1 and 1.0.
            let (found, expected) = (described(&batch), &case["expected"]);
            assert_eq!(&found, expected, "{version}: {name}");
            assert!(batch.orphans.is_empty());
        }
    }
}

#[test]
fn an_older_table_reads_what_a_newer_engine_sends_but_for_what_is_new() {
    let golden = golden(RELEASES[1].1);
    for version in ["0.27.0", "0.29.1", "0.32.0"] {
        let codec = codec(version);
        for (name, case) in golden["outputs"].as_object().expect("cases") {
            let mut expected = case["expected"].clone();
            for output in expected["outputs"].as_array_mut().expect("outputs") {
                output.as_object_mut().expect("an output").remove("error");
            }
            let found = described(&decode(&codec, &frames(case)));
            assert_eq!(found, expected, "{version}: {name}");
        }
    }
}

#[test]
fn outputs_of_unknown_requests_are_dropped_and_unfinished_ones_reported() {
    let codec = codec("0.32.0");
    let golden = golden(RELEASES[0].1);
    let read = |name: &str| {
        let frames = frames(&golden["outputs"][name]);
        match codec.decode_outputs(&frames, |_| None) {
            Ok(Message::Batch(batch)) => batch,
            other => panic!("{other:?}"),
        }
    };
    let batch = read("one token");
    assert!(batch.outputs.is_empty());
    assert_eq!(batch.orphans, ["cmpl-1-00000001"]);
    let batch = read("every way to finish");
    assert!(batch.outputs.is_empty() && batch.orphans.is_empty());
}

#[test]
fn the_last_message_of_an_engine_is_told_from_a_batch() {
    let dead = codec("0.32.0").decode_outputs(&[Bytes::from_static(ENGINE_CORE_DEAD)], |_| None);
    assert!(matches!(dead, Ok(Message::Dead)), "{dead:?}");
}

#[test]
fn a_message_cut_off_or_bent_anywhere_is_an_error_and_never_a_panic() {
    for (version, text) in RELEASES {
        let codec = codec(version);
        let golden = golden(text);
        for case in golden["outputs"].as_object().expect("cases").values() {
            let frames = frames(case);
            let first = &frames[0];
            for end in 0..first.len() {
                let mut cut = frames.clone();
                cut[0] = first.slice(..end);
                let read = codec.decode_outputs(&cut, RequestKey::of_engine_id);
                assert!(read.is_err(), "{version}: cut at {end}");
            }
            let read = |output: &Value| {
                ["logprobs", "prompt_logprobs"]
                    .iter()
                    .any(|name| !output[name].is_null())
            };
            let tensors = case["expected"]["outputs"]
                .as_array()
                .expect("outputs")
                .iter()
                .any(read);
            if tensors && frames.len() > 1 {
                // A tensor without its frame.
                assert!(
                    codec
                        .decode_outputs(&frames[..1], RequestKey::of_engine_id)
                        .is_err()
                );
            }
            for at in 0..first.len() {
                for bent in [0x00, 0xc0, 0xc1, 0xdd, 0xdf, 0xff] {
                    let mut bytes = first.to_vec();
                    bytes[at] = bent;
                    let mut frames = frames.clone();
                    frames[0] = bytes.into();
                    let _ = codec.decode_outputs(&frames, RequestKey::of_engine_id);
                }
            }
        }
    }
}

#[test]
fn the_ready_response_is_read_whatever_keys_it_has() {
    for (version, text) in RELEASES {
        let ready = wire::decode_ready(&unhex(&golden(text)["ready"]["bytes"])).expect(version);
        assert_eq!(ready.max_model_len, Some(2048));
        assert_eq!(ready.num_gpu_blocks, Some(1000));
        assert_eq!(ready.vllm_version.as_deref(), Some("0.32.0+cpu"));
        assert_eq!(ready.kv_cache_max_concurrency, Some(15.625));
        assert_eq!(ready.effective_attention_block_size, None);
        assert_eq!(
            (ready.supports_lora, ready.max_loras),
            (Some(true), Some(4))
        );
        let events = ready.kv_events.expect("configured");
        assert!(events.enabled);
        assert_eq!(events.endpoint.as_deref(), Some("tcp://10.0.0.1:5557"));
        assert_eq!(events.replay_endpoint, None);
    }
    assert_eq!(wire::decode_ready(&[0x80]), Ok(wire::Ready::default()));
}

#[test]
fn the_handshake_is_read() {
    for (_, text) in RELEASES {
        let golden = golden(text);
        for (name, status) in [("hello", Status::Hello), ("ready", Status::Ready)] {
            let message = wire::decode_handshake(&unhex(&golden["handshake"][name]));
            let message = message.expect(name);
            assert_eq!(
                (message.status, message.local, message.headless),
                (status, false, true)
            );
        }
    }
}
