//! Stands between clients and ADD: whatever passes here leaves the engine alive.
//!
//! One bad request ends a vLLM engine (a token beyond the vocabulary crashes the worker, a value
//! that `SamplingParams.__post_init__` refuses ends the thread that reads requests), so every rule
//! that vLLM's own front end enforces is enforced here, and those it forgets: the size limits of
//! the V2 model runner's sampler, what a JSON schema may be, what hand-off parameters may hold.
//! Sources: vLLM 0.32 and 0.33, `sampling_params.py` (`__post_init__`, `_verify_args`, `verify`),
//! `v1/engine/input_processor.py`, `v1/worker/gpu/sample/`.
//!
//! The result is what vLLM's front end would have sent: defaults resolved, greedy requests without
//! top-p, stop tokens completed from the model's end-of-sequence tokens.

mod params;
mod structured;

use crate::{request::Request, wire::Writer};

pub use structured::Backend;

/// Longest request id, in bytes. Ours; engine ids are in every log line and output.
const MAX_ID: usize = 512;

/// What the running engine can take.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Width of the model's logits (`config.json`), not the tokenizer's size.
    pub vocab_size: u32,
    /// As in the ready response: prompt and output together.
    pub max_model_len: u32,
    /// `--max-logprobs`; -1 means the whole vocabulary.
    pub max_logprobs: i64,
    pub dp_size: u32,
    /// The engine runs with `--enable-lora`.
    pub lora: bool,
    /// The engine has a reasoning configuration.
    pub reasoning: bool,
    /// The engine decodes speculatively.
    pub speculative: bool,
    /// Absent: the engine has no tokenizer (`--skip-tokenizer-init`) and no grammars.
    pub structured_outputs: Option<Backend>,
}

impl Limits {
    /// Limits of an engine that was started with vLLM's defaults.
    pub fn new(vocab_size: u32, max_model_len: u32) -> Self {
        Self {
            vocab_size,
            max_model_len,
            // vLLM's default of `--max-logprobs` (config/model.py).
            max_logprobs: 20,
            dp_size: 1,
            lora: false,
            reasoning: false,
            speculative: false,
            structured_outputs: Some(Backend::default()),
        }
    }
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// The field of [`Request`] or [`crate::Sampling`] at fault.
    pub field: &'static str,
    pub message: String,
}

impl Invalid {
    fn new(field: &'static str, message: impl Into<String>) -> Self {
        Self {
            field,
            message: message.into(),
        }
    }
}

/// A request that the engine survives, with every parameter resolved.
#[derive(Debug, Clone)]
pub struct Checked {
    pub(crate) request: Request,
    /// `SamplingParams.extra_args` as a whole, encoded; absent if there are none.
    pub(crate) extra_args: Option<Vec<u8>>,
    /// `SamplingParams.structured_outputs`, encoded.
    pub(crate) structured_outputs: Option<Vec<u8>>,
}

impl Checked {
    pub fn request(&self) -> &Request {
        &self.request
    }
}

/// Checks a request against what the engine can take, and completes it.
///
/// # Errors
/// [`Invalid`] names the first field at fault.
pub fn check(mut request: Request, limits: &Limits) -> Result<Checked, Invalid> {
    check_id(&request.id)?;
    check_prompt(&request, limits)?;
    if let Some(rank) = request.dp_rank
        && rank >= limits.dp_size
    {
        return Err(Invalid::new(
            "dp_rank",
            format!("{rank} is not below the {} ranks", limits.dp_size),
        ));
    }
    check_lora(&request, limits)?;
    request.cache_salt = request.cache_salt.filter(|salt| !salt.is_empty());
    params::check(&mut request, limits)?;
    let structured_outputs = request
        .sampling
        .structured_outputs
        .as_ref()
        .map(|structured| structured::encode(structured, limits.structured_outputs))
        .transpose()?;
    let extra_args = extra_args(&request)?;
    Ok(Checked {
        request,
        extra_args,
        structured_outputs,
    })
}

fn check_id(id: &str) -> Result<(), Invalid> {
    let fault = if id.is_empty() {
        "is empty".to_owned()
    } else if id.len() > MAX_ID {
        format!("has {} bytes, the limit is {MAX_ID}", id.len())
    } else if id.chars().any(char::is_control) {
        "holds a control character".to_owned()
    } else {
        return Ok(());
    };
    Err(Invalid::new("id", fault))
}

fn check_prompt(request: &Request, limits: &Limits) -> Result<(), Invalid> {
    let len = request.prompt.len();
    if len == 0 {
        return Err(Invalid::new("prompt", "is empty"));
    }
    if len >= limits.max_model_len as usize {
        return Err(Invalid::new(
            "prompt",
            format!(
                "{len} tokens and at least one of output exceed the model's length of {}",
                limits.max_model_len
            ),
        ));
    }
    // The maximum first: one pass that the compiler vectorizes, on the way of every prompt.
    let highest = request.prompt.iter().max().unwrap_or_default();
    if highest >= limits.vocab_size {
        return Err(Invalid::new(
            "prompt",
            format!(
                "token id {highest} is not below the vocabulary's size of {}",
                limits.vocab_size
            ),
        ));
    }
    Ok(())
}

fn check_lora(request: &Request, limits: &Limits) -> Result<(), Invalid> {
    let Some(lora) = &request.lora else {
        return Ok(());
    };
    if !limits.lora {
        return Err(Invalid::new("lora", "the engine runs without LoRA"));
    }
    if lora.id == 0 || lora.name.is_empty() || lora.path.is_empty() {
        return Err(Invalid::new(
            "lora",
            "an adapter needs a name, a path and an id of at least 1",
        ));
    }
    Ok(())
}

/// Keys of `extra_args` that connectors act upon. A client that could set them could name any
/// peer and any block; they come as fields of their own. And one that has the engine tell of copies that it does
/// not make (v1/request.py, 0.32), so that nobody who counts them is right any more.
const RESERVED_ARGS: [&str; 3] = [
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_cache_report_mode",
];

fn extra_args(request: &Request) -> Result<Option<Vec<u8>>, Invalid> {
    let text = request.sampling.extra_args.as_deref().unwrap_or("{}");
    let args: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
        .map_err(|error| Invalid::new("extra_args", format!("not a JSON object: {error}")))?;
    if let Some(key) = RESERVED_ARGS.iter().find(|key| args.contains_key(**key)) {
        return Err(Invalid::new("extra_args", format!("`{key}` is reserved")));
    }
    if let Some(params) = &request.kv_transfer_params {
        crate::wire::check_params(params)
            .map_err(|error| Invalid::new("kv_transfer_params", error.to_string()))?;
    }
    let len = args.len() + usize::from(request.kv_transfer_params.is_some());
    if len == 0 {
        return Ok(None);
    }
    let mut writer = Writer::default();
    writer.map(len);
    for (key, value) in &args {
        writer.str(key);
        writer.json(value);
    }
    if let Some(params) = &request.kv_transfer_params {
        writer.str("kv_transfer_params");
        writer.raw(params);
    }
    Ok(Some(writer.bytes))
}

#[cfg(test)]
mod tests;
