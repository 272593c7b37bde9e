//! A request as the scheduler sees it: the parts of vLLM's `EngineCoreRequest` and
//! `SamplingParams` that change what an engine does.

use std::sync::Arc;

use crate::wire::msgpack::Value;

/// What a frontend asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: Arc<str>,
    /// Which of the frontend's sockets gets the answer.
    pub client: usize,
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub cache_salt: Option<String>,
    /// Adapter id and name.
    pub lora: Option<(u64, String)>,
    /// Lower runs first under the priority policy.
    pub priority: i64,
    pub transfer: Transfer,
    /// Only tell the connector that the request is over; generate nothing.
    pub abort_immediately: bool,
}

/// Sampling parameters; defaults as in vLLM.
#[derive(Clone, Debug, Default)]
pub struct Sampling {
    pub max_tokens: u32,
    pub min_tokens: u32,
    /// Mixed into the choice of tokens when the temperature is above zero.
    pub seed: Option<u64>,
    pub greedy: bool,
    /// Ends the answer; absent where the frontend wants EOS ignored, as in vLLM.
    pub eos: Option<u32>,
    pub stop_token_ids: Vec<u32>,
    /// Top log-probabilities per token; -1: the whole vocabulary.
    pub logprobs: Option<i64>,
    pub prompt_logprobs: Option<i64>,
    pub logit_bias: Vec<(u32, f64)>,
    pub allowed: Vec<u32>,
    pub bad_words: Vec<Vec<u32>>,
    /// Tokens to answer with, whatever the prompt (`extra_args.sim_output`), then EOS.
    pub script: Option<Vec<u32>>,
    pub skip_reading_prefix_cache: bool,
}

/// What `kv_transfer_params` ask of the KV connector.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Transfer {
    /// Nothing.
    #[default]
    None,
    /// Keep the blocks for another engine and say where they are.
    Produce,
    /// Fetch the prompt's KV from where these parameters say.
    Fetch(Value),
}
