//! KV events as vLLM publishes them since 0.27: maps that name their type.

use super::msgpack::Value;
use crate::cache::CacheEvent;

/// Where blocks are, as every event says. vLLM says so on a CPU, too.
const MEDIUM: &str = "GPU";

/// A batch of events: `[seconds since 1970, events, data-parallel rank]`.
#[must_use]
pub fn encode(now: f64, events: &[CacheEvent], block_size: usize, rank: u32) -> Vec<u8> {
    Value::Array(vec![
        Value::Float(now),
        Value::Array(
            events
                .iter()
                .map(|event| encode_event(event, block_size))
                .collect(),
        ),
        Value::from(rank),
    ])
    .to_vec()
}

fn encode_event(event: &CacheEvent, block_size: usize) -> Value {
    match event {
        CacheEvent::Stored {
            hashes,
            parent,
            tokens,
            lora,
            extra_keys,
        } => Value::map([
            ("type", "BlockStored".into()),
            ("block_hashes", hashes.clone().into()),
            ("parent_block_hash", (*parent).into()),
            ("token_ids", tokens.clone().into()),
            ("block_size", block_size.into()),
            ("lora_id", lora.as_ref().map(|(id, _)| *id).into()),
            ("medium", MEDIUM.into()),
            (
                "lora_name",
                lora.as_ref().map(|(_, name)| name.clone()).into(),
            ),
            ("extra_keys", extra_keys.clone().into()),
            ("group_idx", Value::Int(0)),
            ("kv_cache_spec_kind", "full_attention".into()),
        ]),
        CacheEvent::Removed { hashes } => Value::map([
            ("type", "BlockRemoved".into()),
            ("block_hashes", hashes.clone().into()),
            ("medium", MEDIUM.into()),
            ("group_idx", Value::Int(0)),
        ]),
        CacheEvent::Cleared => Value::map([("type", "AllBlocksCleared".into())]),
    }
}
