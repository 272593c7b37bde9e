//! What vLLM's own encoder wrote of KV events is what we read: arrays of 0.23, maps of 0.32 and 0.33.

use serde_json::{Value, json};
use stator_common::events::Medium;
use stator_engine::kv_events::{ExtraKey, KvEvent, Spec, decode};

const RELEASES: [(&str, &str); 3] = [
    ("0.23", include_str!("golden/v0_23/events.json")),
    ("0.32", include_str!("golden/v0_32/events.json")),
    ("0.33", include_str!("golden/v0_33/events.json")),
];

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex");
    (0..text.len()).step_by(2).map(byte).collect()
}

fn medium(medium: Medium) -> &'static str {
    match medium {
        Medium::Gpu => "gpu",
        Medium::Cpu => "cpu",
        Medium::Storage => "storage",
    }
}

/// An event in the terms of `scripts/golden_events.py`.
fn described(event: &KvEvent) -> Value {
    let key = |key: &ExtraKey| match key {
        ExtraKey::Text(text) => json!(text),
        ExtraKey::Media { id, offset } => json!([id, offset]),
        ExtraKey::Digest(bytes) => json!(bytes),
    };
    match event {
        KvEvent::Stored(stored) => json!({
            "stored": stored.hashes,
            "parent": stored.parent,
            "tokens": stored.tokens,
            "block_size": stored.block_size,
            "medium": medium(stored.place.medium),
            "lora": stored.lora,
            "group": stored.place.group,
            "spec": stored.spec.map(|spec| match spec {
                Spec::Full => "full",
                Spec::Partial => "partial",
            }),
            "extra_keys": stored
                .extra_keys
                .iter()
                .map(|keys| keys.iter().map(key).collect::<Vec<_>>())
                .collect::<Vec<_>>(),
        }),
        KvEvent::Removed(removed) => json!({
            "removed": removed.hashes,
            "medium": medium(removed.place.medium),
            "group": removed.place.group,
        }),
        KvEvent::Cleared => json!("cleared"),
    }
}

#[test]
fn both_encodings_of_events_mean_what_they_say() {
    for (release, text) in RELEASES {
        let golden: Value = serde_json::from_str(text).expect("JSON");
        for (name, case) in golden.as_object().expect("cases") {
            let bytes = unhex(case["bytes"].as_str().expect("hex"));
            let batch = decode(&bytes).expect(name);
            assert_eq!(json!(batch.stamp), case["stamp"], "{release}: {name}");
            assert_eq!(json!(batch.dp_rank), case["dp_rank"], "{release}: {name}");
            let events: Vec<Value> = batch.events.iter().map(described).collect();
            assert_eq!(json!(events), case["events"], "{release}: {name}");
            // What is cut off is an error, not something else.
            for end in 0..bytes.len() {
                assert!(decode(&bytes[..end]).is_err(), "{release}: {name} to {end}");
            }
        }
    }
}
