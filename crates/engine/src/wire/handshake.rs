//! The messages before the first request: HELLO, init, READY and the ready response.
//!
//! All are maps. What is missing takes a default and what is new is passed over; the ready
//! response in particular gains keys with every release.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::lockstep::Lockstep;

use super::{
    Writer,
    read::{Reader, WireError},
};

/// What an engine says on the handshake socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    pub status: Status,
    /// Launched by, and on the machine of, a vLLM front end.
    pub local: bool,
    pub headless: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The engine waits for the init message.
    Hello,
    /// The model is loaded.
    Ready,
    Other(String),
}

/// Reads HELLO and READY.
///
/// # Errors
/// [`WireError`], when the bytes are no map or have no status.
pub fn decode_handshake(bytes: &[u8]) -> Result<Handshake, WireError> {
    let mut reader = Reader::new(bytes);
    let (mut status, mut local, mut headless) = (None, false, false);
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"status" => {
                status = Some(match reader.str("status")? {
                    "HELLO" => Status::Hello,
                    "READY" => Status::Ready,
                    other => Status::Other(other.to_owned()),
                });
            }
            b"local" => local = reader.bool()?,
            b"headless" => headless = reader.bool()?,
            _ => drop(reader.skip()?),
        }
    }
    Ok(Handshake {
        status: status.ok_or(WireError::Missing {
            message: "handshake",
            field: "status",
        })?,
        local,
        headless,
    })
}

/// Writes the init message: where the engine finds its clients, one address each per client.
/// Enough for dense models, where every DP rank is an engine of its own.
pub fn encode_init(inputs: &[String], outputs: &[String]) -> Bytes {
    encode_init_of(inputs, outputs, None)
}

/// Writes the init message of a rank that steps together with others, if it does.
pub(crate) fn encode_init_of(
    inputs: &[String],
    outputs: &[String],
    lockstep: Option<&Lockstep>,
) -> Bytes {
    let mut writer = Writer::default();
    writer.map(2);
    writer.str("addresses");
    writer.map(if lockstep.is_some() { 4 } else { 2 });
    for (name, addresses) in [("inputs", inputs), ("outputs", outputs)] {
        writer.str(name);
        writer.array(addresses.len());
        addresses.iter().for_each(|address| writer.str(address));
    }
    let Some(lockstep) = lockstep else {
        writer.str("parallel_config");
        writer.map(0);
        return writer.bytes.into();
    };
    let addresses = lockstep.addresses();
    writer.str("coordinator_input");
    writer.str(&addresses.input);
    writer.str("coordinator_output");
    writer.str(&addresses.output);
    writer.str("parallel_config");
    writer.map(4);
    writer.str("data_parallel_master_ip");
    writer.str(&addresses.host);
    writer.str("data_parallel_master_port");
    writer.uint(u64::from(addresses.port));
    writer.str("_data_parallel_master_port_list");
    writer.array(addresses.further_ports.len());
    for port in &addresses.further_ports {
        writer.uint(u64::from(*port));
    }
    writer.str("data_parallel_size");
    writer.uint(u64::from(lockstep.ranks()));
    writer.bytes.into()
}

/// `EngineCoreReadyResponse`: what the engine is once its model is loaded. Which keys there are
/// depends on the version; kept on disk for re-attach.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Ready {
    pub vllm_version: Option<String>,
    pub instance_id: Option<String>,
    pub dtype: Option<String>,
    /// After fitting to the KV cache.
    pub max_model_len: Option<u32>,
    pub num_gpu_blocks: Option<u32>,
    pub block_size: Option<u32>,
    /// Block size of the full-attention layers, in tokens; differs from `block_size` on hybrid models.
    pub effective_attention_block_size: Option<u32>,
    pub kv_cache_size_tokens: Option<u64>,
    pub kv_cache_max_concurrency: Option<f64>,
    pub max_num_seqs: Option<u32>,
    pub max_num_batched_tokens: Option<u32>,
    pub world_size: Option<u32>,
    pub tensor_parallel_size: Option<u32>,
    pub pipeline_parallel_size: Option<u32>,
    pub data_parallel_size: Option<u32>,
    pub data_parallel_rank: Option<u32>,
    pub supports_lora: Option<bool>,
    pub max_loras: Option<u32>,
    pub enable_sleep_mode: Option<bool>,
    pub kv_events: Option<KvEvents>,
}

/// Where an engine publishes KV events, with endpoints as resolved by it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct KvEvents {
    pub enabled: bool,
    pub publisher: Option<String>,
    pub endpoint: Option<String>,
    pub replay_endpoint: Option<String>,
    pub topic: String,
}

/// Reads a ready response.
///
/// # Errors
/// [`WireError`], when the bytes are no map or a known key has another type.
pub fn decode_ready(bytes: &[u8]) -> Result<Ready, WireError> {
    let mut reader = Reader::new(bytes);
    let mut ready = Ready::default();
    for _ in 0..reader.map()? {
        let key = reader.str_bytes()?;
        if reader.nil()? {
            continue;
        }
        match key {
            b"vllm_version" => ready.vllm_version = text(&mut reader)?,
            b"instance_id" => ready.instance_id = text(&mut reader)?,
            b"dtype" => ready.dtype = text(&mut reader)?,
            b"max_model_len" => ready.max_model_len = Some(reader.u32()?),
            b"num_gpu_blocks" => ready.num_gpu_blocks = Some(reader.u32()?),
            b"block_size" => ready.block_size = Some(reader.u32()?),
            b"effective_attention_block_size" => {
                ready.effective_attention_block_size = Some(reader.u32()?);
            }
            b"kv_cache_size_tokens" => {
                ready.kv_cache_size_tokens = Some(reader.number("a count of tokens")?);
            }
            b"kv_cache_max_concurrency" => ready.kv_cache_max_concurrency = Some(reader.f64()?),
            b"max_num_seqs" => ready.max_num_seqs = Some(reader.u32()?),
            b"max_num_batched_tokens" => ready.max_num_batched_tokens = Some(reader.u32()?),
            b"world_size" => ready.world_size = Some(reader.u32()?),
            b"tensor_parallel_size" => ready.tensor_parallel_size = Some(reader.u32()?),
            b"pipeline_parallel_size" => ready.pipeline_parallel_size = Some(reader.u32()?),
            b"data_parallel_size" => ready.data_parallel_size = Some(reader.u32()?),
            b"data_parallel_rank" => ready.data_parallel_rank = Some(reader.u32()?),
            b"supports_lora" => ready.supports_lora = Some(reader.bool()?),
            b"max_loras" => ready.max_loras = Some(reader.u32()?),
            b"enable_sleep_mode" => ready.enable_sleep_mode = Some(reader.bool()?),
            b"kv_events_config" => ready.kv_events = Some(kv_events(&mut reader)?),
            _ => drop(reader.skip()?),
        }
    }
    Ok(ready)
}

fn kv_events(reader: &mut Reader<'_>) -> Result<KvEvents, WireError> {
    let mut events = KvEvents::default();
    for _ in 0..reader.map()? {
        let key = reader.str_bytes()?;
        if reader.nil()? {
            continue;
        }
        match key {
            b"enable_kv_cache_events" => events.enabled = reader.bool()?,
            b"publisher" => events.publisher = text(reader)?,
            b"endpoint" => events.endpoint = text(reader)?,
            b"replay_endpoint" => events.replay_endpoint = text(reader)?,
            b"topic" => events.topic = text(reader)?.unwrap_or_default(),
            _ => drop(reader.skip()?),
        }
    }
    Ok(events)
}

fn text(reader: &mut Reader<'_>) -> Result<Option<String>, WireError> {
    Ok(Some(reader.str("a text")?.to_owned()))
}
