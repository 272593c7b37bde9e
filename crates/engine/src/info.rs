//! What an engine is.

use std::path::PathBuf;

use crate::{
    config::{Config, Launch},
    error::StartError,
    model,
    wire::{KvEvents, Ready},
};

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

impl EngineInfo {
    /// # Errors
    /// [`StartError::ReadyLacks`] and [`StartError::NoVocabSize`]: without these, requests cannot be
    /// checked.
    pub(crate) fn new(
        config: &Config,
        ready: &Ready,
        pid: Option<i32>,
        adopted: bool,
    ) -> Result<Self, StartError> {
        let (name, folder) = match &config.launch {
            Launch::Spawn(spawn) => (Some(spawn.model.clone()), model::folder(&spawn.model)),
            Launch::Simulate(simulate) => {
                (Some(simulate.model.clone()), model::folder(&simulate.model))
            }
            Launch::Attach(attach) => {
                let folder = attach.model.clone();
                (
                    folder.as_ref().map(|folder| folder.display().to_string()),
                    folder,
                )
            }
        };
        let vocab_size = config
            .vocab_size
            .or_else(|| model::vocab_size(folder.as_deref()?));
        let vocab_size = vocab_size.ok_or(StartError::NoVocabSize {
            model: name.unwrap_or_default(),
        })?;
        let version = ready.vllm_version.clone();
        Ok(Self {
            vllm_version: version.ok_or(StartError::ReadyLacks("vllm_version"))?,
            max_model_len: ready
                .max_model_len
                .ok_or(StartError::ReadyLacks("max_model_len"))?,
            block_size: ready
                .block_size
                .ok_or(StartError::ReadyLacks("block_size"))?,
            num_gpu_blocks: ready.num_gpu_blocks.unwrap_or(0),
            max_num_seqs: ready.max_num_seqs.unwrap_or(0),
            max_num_batched_tokens: ready.max_num_batched_tokens.unwrap_or(0),
            vocab_size,
            dp_rank: config.dp_rank,
            supports_lora: ready.supports_lora.unwrap_or(false),
            kv_events: ready.kv_events.clone(),
            model: folder,
            pid: pid.map(i32::cast_unsigned),
            adopted,
        })
    }
}
