//! What a request is before the engine sees it: typed, complete, and not yet trusted.
//!
//! [`crate::validate::check`] turns a [`Request`] into a [`crate::validate::Checked`], the only
//! thing that can be encoded. Nothing here knows how vLLM writes any of it.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// One attempt at one choice. `n > 1` is n of these.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The id as the client sees it. The engine is given `<id>-<8 hex digits>`.
    pub id: String,
    pub prompt: Tokens,
    pub sampling: Sampling,
    /// Keeps tenants' prefix caches apart.
    pub cache_salt: Option<String>,
    /// Lower runs first, under `--scheduling-policy priority`.
    pub priority: i32,
    pub dp_rank: Option<u32>,
    pub lora: Option<Lora>,
    /// KV hand-off parameters as the other engine wrote them: one msgpack map, passed on byte
    /// for byte as `extra_args["kv_transfer_params"]`.
    pub kv_transfer_params: Option<Bytes>,
    /// W3C trace context.
    pub trace_headers: Vec<(String, String)>,
    /// Whether structured outputs hold from the first token on, or only after the model's thoughts.
    /// Absent: the engine tells from the prompt.
    pub reasoning_ended: Option<bool>,
    /// The engine queues the request and ends it at once, so that its KV connector lets go of
    /// what the other engine holds. No output follows.
    pub abort_immediately: bool,
}

/// Token ids as they travel: little-endian `u32`, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens(Bytes);

impl Tokens {
    /// Takes the ids as they came from the wire; `None` if the length is not a multiple of four.
    pub fn from_le_bytes(bytes: Bytes) -> Option<Self> {
        bytes.len().is_multiple_of(4).then_some(Self(bytes))
    }

    pub fn len(&self) -> usize {
        self.0.len() / 4
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        let (ids, _) = self.0.as_chunks::<4>();
        ids.iter().map(|id| u32::from_le_bytes(*id))
    }
}

impl From<&[u32]> for Tokens {
    fn from(ids: &[u32]) -> Self {
        let mut bytes = BytesMut::with_capacity(ids.len() * 4);
        for id in ids {
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        Self(bytes.freeze())
    }
}

/// Sampling parameters by the engine's field names; absent means the engine's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// 0 and -1 mean all tokens.
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    /// -1 means none.
    pub seed: Option<i64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    /// At least 1; cut to what the model length leaves room for.
    pub max_tokens: u32,
    pub min_tokens: u32,
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    /// Top log-probabilities per generated token (0: the sampled one only, -1: all).
    pub logprobs: Option<i32>,
    pub prompt_logprobs: Option<i32>,
    pub logit_bias: Vec<(u32, f32)>,
    /// Empty: every token is allowed.
    pub allowed_token_ids: Vec<u32>,
    /// Token sequences that must not appear.
    pub bad_words: Vec<Vec<u32>>,
    pub structured_outputs: Option<StructuredOutputs>,
    /// The model's end-of-sequence token.
    pub eos_token_id: Option<u32>,
    /// Further tokens that end generation beside `stop_token_ids` and `eos_token_id`.
    pub all_stop_token_ids: Vec<u32>,
    /// A JSON object for engine plug-ins (`vllm_xargs`), as text.
    pub extra_args: Option<String>,
    pub skip_reading_prefix_cache: Option<bool>,
    /// Tokens a reasoning model may think for.
    pub thinking_token_budget: Option<u32>,
}

/// A grammar that the output must follow.
#[derive(Debug, Clone, PartialEq)]
pub struct StructuredOutputs {
    pub constraint: Constraint,
    pub disable_any_whitespace: bool,
    pub disable_additional_properties: bool,
    pub whitespace_pattern: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// A JSON schema, as JSON text.
    Json(String),
    Regex(String),
    Choice(Vec<String>),
    /// EBNF or Lark.
    Grammar(String),
    /// Any JSON object.
    JsonObject,
    /// A structural tag, as JSON text.
    StructuralTag(String),
}

/// A LoRA adapter as the engine names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    pub name: String,
    /// Unique per adapter, at least 1.
    pub id: u32,
    /// Folder of the adapter, on the engine's machine.
    pub path: String,
}
