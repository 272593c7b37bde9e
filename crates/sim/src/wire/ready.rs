//! What an engine says at the start: HELLO, READY, and what it is.

use super::WireVersion;
use super::msgpack::{DecodeError, Value, decode};
use crate::config::Config;

/// Where a frontend's sockets are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
}

/// A greeting: `HELLO` or `READY`.
#[must_use]
pub fn greeting(status: &str) -> Vec<u8> {
    Value::map([
        ("status", status.into()),
        ("local", Value::Bool(false)),
        ("headless", Value::Bool(true)),
    ])
    .to_vec()
}

/// Reads the answer to HELLO; `None` if it names no addresses.
///
/// # Errors
/// [`DecodeError`].
pub fn decode_init(data: &[u8]) -> Result<Option<Addresses>, DecodeError> {
    let value = decode(data)?;
    let list = |key| -> Option<Vec<String>> {
        let items = value.get("addresses")?.get(key)?.as_array()?;
        items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect()
    };
    Ok(list("inputs")
        .zip(list("outputs"))
        .map(|(inputs, outputs)| Addresses { inputs, outputs }))
}

/// `EngineCoreReadyResponse`: what a frontend learns about the engine.
#[must_use]
pub fn ready_response(config: &Config, instance_id: &str) -> Vec<u8> {
    let limits = &config.limits;
    let tokens = limits.block_size * limits.num_blocks;
    let events = config.kv_events.as_ref().map_or(Value::Nil, |events| {
        Value::map([
            ("enable_kv_cache_events", Value::Bool(true)),
            ("publisher", "zmq".into()),
            ("endpoint", events.endpoint.as_str().into()),
            ("replay_endpoint", events.replay_endpoint.clone().into()),
            ("buffer_steps", events.buffer_steps.into()),
            ("hwm", Value::Int(100_000)),
            ("max_queue_size", Value::Int(100_000)),
            ("topic", events.topic.as_str().into()),
        ])
    });
    let mut entries = vec![
        ("max_model_len", Value::from(limits.max_model_len)),
        ("num_gpu_blocks", limits.num_blocks.into()),
        ("block_size", limits.block_size.into()),
        ("dp_stats_address", Value::Nil),
        ("dtype", "bfloat16".into()),
        ("vllm_version", config.wire.vllm_version().into()),
        ("world_size", Value::Int(1)),
        ("data_parallel_size", Value::Int(1)),
        ("tensor_parallel_size", Value::Int(1)),
        ("pipeline_parallel_size", Value::Int(1)),
        ("decode_context_parallel_size", Value::Int(1)),
        ("data_parallel_rank", config.dp_rank.into()),
        ("max_num_seqs", limits.max_num_seqs.into()),
        (
            "max_num_batched_tokens",
            limits.max_num_batched_tokens.into(),
        ),
        ("instance_id", instance_id.into()),
        ("kv_cache_size_tokens", tokens.into()),
        (
            "kv_cache_max_concurrency",
            Value::Float(tokens as f64 / limits.max_model_len as f64),
        ),
        ("kv_events_config", events),
    ];
    if config.wire != WireVersion::V0_27 {
        entries.extend([
            ("supports_lora", Value::Bool(config.max_loras > 0)),
            ("max_loras", config.max_loras.into()),
            ("mamba_block_size", Value::Nil),
            ("weight_transfer_backend", Value::Nil),
            ("enable_sleep_mode", Value::Bool(config.sleep_mode)),
            ("supports_draft_weight_updates", Value::Bool(false)),
            ("effective_attention_block_size", limits.block_size.into()),
        ]);
    }
    if config.wire == WireVersion::V0_33 {
        entries.extend([
            ("coord_store_port", Value::Int(0)),
            ("coordinator_input_address", Value::Nil),
            ("coordinator_output_address", Value::Nil),
        ]);
    }
    let entries = entries.into_iter().map(|(key, value)| (key.into(), value));
    Value::Map(entries.collect()).to_vec()
}
