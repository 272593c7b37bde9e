//! What an engine did, without what may differ between a model and a simulation: times, hashes, and
//! the tokens that were chosen.

use std::collections::HashMap;

use stator_sim::wire::msgpack::Value;

use super::Answer;

/// One line per output of an answer.
pub fn answer(answer: &Answer) -> Vec<String> {
    let mut lines = Vec::new();
    for (fields, frames) in &answer.outputs {
        let tokens = fields[1].as_array().unwrap().len();
        let events: Vec<u64> = fields[7]
            .as_array()
            .unwrap_or(&[])
            .iter()
            .map(|event| event.get("type").unwrap().as_u64().unwrap())
            .collect();
        let stop = match (&fields[6], fields[1].as_array().unwrap().last()) {
            (Value::Nil, _) => "-",
            (reason, Some(token)) if reason == token => "its last token",
            _ => "something else",
        };
        let shape: String = fields.iter().map(kind).collect();
        lines.push(format!(
            "{} fields {shape}, {tokens} tokens, finish {:?}, stopped by {stop}, events {events:?}, \
             logprobs {}, prompt logprobs {}, prefill {}, {frames} more frames",
            fields.len(),
            fields[5].as_u64(),
            arrays(&fields[2]),
            arrays(&fields[3]),
            prefill(&fields[11]),
        ));
    }
    lines
}

fn kind(value: &Value) -> char {
    match value {
        Value::Nil => '-',
        Value::Bool(_) => 'b',
        Value::Int(_) | Value::UInt(_) => 'i',
        Value::Float(_) => 'f',
        Value::Str(_) => 's',
        Value::Bin(_) => 'x',
        Value::Array(_) => 'a',
        Value::Map(_) => 'm',
        Value::Ext(..) => 'e',
    }
}

/// Types, shapes and places of arrays.
fn arrays(value: &Value) -> String {
    let Some(elements) = value.as_array() else {
        return "-".into();
    };
    let describe = |element: &Value| match element.as_array() {
        Some([dtype, shape, data]) => {
            let place = match data {
                Value::Ext(kind, data) => format!("ext {kind} of {}", data.len()),
                other => format!("frame {:?}", other.as_u64()),
            };
            let shape: Vec<_> = shape
                .as_array()
                .unwrap()
                .iter()
                .map(Value::as_u64)
                .collect();
            format!("{:?}{shape:?} {place}", dtype.as_str())
        }
        _ => format!("{}", kind(element)),
    };
    elements.iter().map(describe).collect::<Vec<_>>().join(" ")
}

fn prefill(value: &Value) -> String {
    let Some(entries) = value.as_map() else {
        return "-".into();
    };
    let entries = entries.iter();
    let entries =
        entries.map(|(key, value)| format!("{}={:?}", key.as_str().unwrap(), value.as_u64()));
    entries.collect::<Vec<_>>().join(" ")
}

/// One line per KV event, whatever batch it came in (that depends on which requests shared a step); hashes are numbered in the order in which they first appear.
pub fn events(batches: &[(u64, Vec<Value>)]) -> Vec<String> {
    let mut names: HashMap<u64, usize> = HashMap::new();
    let mut lines = Vec::new();
    for (_, batch) in batches {
        for event in batch {
            let mut name = |value: &Value| {
                let count = names.len();
                *names.entry(value.as_u64().unwrap()).or_insert(count)
            };
            let parent = event.get("parent_block_hash").map(&mut name);
            let hashes = event
                .get("block_hashes")
                .and_then(Value::as_array)
                .unwrap_or(&[]);
            let hashes: Vec<usize> = hashes.iter().map(name).collect();
            let keys: Vec<&str> = event
                .as_map()
                .unwrap()
                .iter()
                .map(|(key, _)| key.as_str().unwrap())
                .collect();
            let text = |key| event.get(key).and_then(Value::as_str);
            let number = |key| event.get(key).and_then(Value::as_u64);
            let tokens = event
                .get("token_ids")
                .and_then(Value::as_array)
                .map(<[Value]>::len);
            lines.push(format!(
                "{:?} blocks {hashes:?} after {parent:?}, {tokens:?} tokens, block size {:?}, \
                 medium {:?}, extra {:?}, group {:?}, {:?}, keys {keys:?}",
                text("type"),
                number("block_size"),
                text("medium"),
                event.get("extra_keys"),
                number("group_idx"),
                text("kv_cache_spec_kind"),
            ));
        }
    }
    lines
}
