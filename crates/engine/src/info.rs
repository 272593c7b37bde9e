//! What an engine is.

use std::path::PathBuf;

use crate::wire::KvEvents;

/// What an engine is: from its ready response, and from the model's files.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// "0.32.0" and the like.
    pub vllm_version: String,
    /// Tokens of prompt and output together that fit one request.
    pub max_model_len: u32,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// KV blocks of the engine.
    pub num_gpu_blocks: u32,
    /// Requests that run at once.
    pub max_num_seqs: u32,
    /// Tokens in one step.
    pub max_num_batched_tokens: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// The rank that the configuration gave it.
    pub dp_rank: u32,
    /// Whether LoRA adapters can be loaded.
    pub supports_lora: bool,
    /// Where the engine publishes KV events, as vLLM resolved it.
    pub kv_events: Option<KvEvents>,
    /// The model's folder on this machine, where there is one.
    pub model: Option<PathBuf>,
    /// The process that leads the engine's group; absent for an attached engine.
    pub pid: Option<u32>,
    /// Whether a running engine was taken over.
    pub adopted: bool,
}
