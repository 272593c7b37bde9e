//! From the shared request fields to the engine's sampling parameters.
//!
//! Ranges, defaults and their order (request, then `generation_config.json`, then OpenAI's) are vLLM's
//! (0.32, `sampling_params.py`), checked here so that the answer names the field; the engine client checks
//! again what could harm an engine.

mod counts;
mod tokens;

use stator_common::proto::worker::Sampling;
use stator_text::Tokenizer;

use crate::models::GenerationConfig;
use crate::openai::error::ApiError;
use crate::openai::request::Shared;
use crate::openai::structured;

pub(crate) use counts::{MAX_CHOICES, choices, lengths};
use counts::{logprobs, thinking_budget, within};
pub(crate) use tokens::stop_strings;
use tokens::{allowed_tokens, bad_words, logit_bias, stop_tokens};

/// Below this a temperature means greedy (vLLM's `_SAMPLING_EPS`).
const GREEDY: f64 = 1e-5;
/// Smallest temperature that is not greedy; smaller ones are raised to it (vLLM's `_MAX_TEMP`).
const MIN_TEMPERATURE: f64 = 1e-2;

/// What a model allows, and what it prefers where a request says nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits<'a> {
    /// Tokens of prompt and output together, at most.
    pub(crate) max_model_len: u32,
    /// Token ids are below this.
    pub(crate) vocab_size: u32,
    /// Candidates for which log-probabilities may be asked; -1: all.
    pub(crate) max_logprobs: i32,
    /// The tokenizer's end-of-sequence token.
    pub(crate) eos_token_id: Option<u32>,
    /// The model's own defaults, and all tokens that end an answer.
    pub(crate) generation: &'a GenerationConfig,
}

/// What an endpoint decides about sampling by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Tokens to generate at most, as asked for, with the name of the field.
    pub(crate) max_tokens: Option<i64>,
    pub(crate) max_tokens_field: &'static str,
    /// Candidates per generated token; -1: all.
    pub(crate) logprobs: Option<i64>,
    pub(crate) logprobs_field: &'static str,
    /// Candidates per prompt token.
    pub(crate) prompt_logprobs: Option<i64>,
    /// Tokens of the prompt.
    pub(crate) prompt_len: usize,
}

/// Refuses fields that are known, not supported, and would change the answer.
pub(crate) fn refuse_unsupported(shared: &Shared) -> Result<(), ApiError> {
    let unsupported = [
        ("use_beam_search", shared.use_beam_search == Some(true)),
        (
            "logprob_token_ids",
            shared
                .logprob_token_ids
                .as_ref()
                .is_some_and(|ids| !ids.is_empty()),
        ),
        ("prompt_embeds", shared.prompt_embeds.is_some()),
        (
            "repetition_detection",
            shared.repetition_detection.is_some(),
        ),
        ("kv_transfer_params", shared.kv_transfer_params.is_some()),
        ("ec_transfer_params", shared.ec_transfer_params.is_some()),
        ("mm_processor_kwargs", shared.mm_processor_kwargs.is_some()),
        ("media_io_kwargs", shared.media_io_kwargs.is_some()),
    ];
    match unsupported.iter().find(|(_, set)| *set) {
        Some((name, _)) => Err(ApiError::invalid(*name, format!("{name} is not supported"))),
        None => Ok(()),
    }
}

/// Returns the sampling parameters of one choice. Seeds of further choices are the caller's.
///
/// # Errors
/// [`Code::InvalidRequest`](stator_common::Code::InvalidRequest), naming the field.
pub(crate) fn sampling(
    shared: &Shared,
    wanted: &Wanted,
    limits: &Limits<'_>,
    tokenizer: &Tokenizer,
) -> Result<Sampling, ApiError> {
    let defaults = limits.generation;
    let mut temperature = shared.temperature.or(defaults.temperature).unwrap_or(1.0);
    let mut top_p = shared.top_p.or(defaults.top_p).unwrap_or(1.0);
    let mut top_k = shared.top_k.map(|k| k.0).or(defaults.top_k).unwrap_or(0);
    let mut min_p = shared.min_p.or(defaults.min_p).unwrap_or(0.0);
    let presence = shared
        .presence_penalty
        .or(defaults.presence_penalty)
        .unwrap_or(0.0);
    let frequency = shared
        .frequency_penalty
        .or(defaults.frequency_penalty)
        .unwrap_or(0.0);
    let repetition = shared
        .repetition_penalty
        .or(defaults.repetition_penalty)
        .unwrap_or(1.0);
    within(
        "temperature",
        "in [0, 2]",
        (0.0..=2.0).contains(&temperature),
        temperature,
    )?;
    within("top_p", "in (0, 1]", top_p > 0.0 && top_p <= 1.0, top_p)?;
    within(
        "top_k",
        "0 (all), or at least 1",
        top_k >= -1 && top_k <= i64::from(u32::MAX),
        top_k,
    )?;
    within("min_p", "in [0, 1]", (0.0..=1.0).contains(&min_p), min_p)?;
    within(
        "presence_penalty",
        "in [-2, 2]",
        (-2.0..=2.0).contains(&presence),
        presence,
    )?;
    within(
        "frequency_penalty",
        "in [-2, 2]",
        (-2.0..=2.0).contains(&frequency),
        frequency,
    )?;
    within(
        "repetition_penalty",
        "greater than 0",
        repetition > 0.0 && repetition.is_finite(),
        repetition,
    )?;
    if temperature < GREEDY {
        (temperature, top_p, top_k, min_p) = (0.0, 1.0, 0, 0.0);
        if choices(shared)? > 1 {
            return Err(ApiError::invalid(
                "n",
                "n must be 1 with greedy sampling (temperature 0)",
            ));
        }
    } else {
        temperature = temperature.max(MIN_TEMPERATURE);
    }

    let (max_tokens, min_tokens) = lengths(shared, wanted, limits)?;
    let ignore_eos = shared.ignore_eos.unwrap_or(false);
    let (stop_token_ids, all_stop_token_ids) = stop_tokens(shared, limits, ignore_eos)?;

    Ok(Sampling {
        temperature: Some(temperature),
        top_p: Some(top_p),
        top_k: Some(top_k.max(0)),
        min_p: Some(min_p),
        seed: shared.seed.map(|seed| seed.0).filter(|&seed| seed != -1),
        presence_penalty: Some(presence),
        frequency_penalty: Some(frequency),
        repetition_penalty: Some(repetition),
        max_tokens,
        min_tokens,
        stop_token_ids,
        ignore_eos,
        logprobs: logprobs(wanted.logprobs_field, wanted.logprobs, limits)?,
        prompt_logprobs: logprobs("prompt_logprobs", wanted.prompt_logprobs, limits)?,
        logit_bias: logit_bias(shared, limits)?,
        allowed_token_ids: allowed_tokens(shared, limits)?,
        bad_words: bad_words(shared, limits, tokenizer)?,
        structured_outputs: structured::constraint(shared)?,
        eos_token_id: limits.eos_token_id.filter(|_| !ignore_eos),
        all_stop_token_ids,
        extra_args_json: extra_args(shared)?,
        // With the prefix cache the engine would score only the part of the prompt that it computes.
        skip_reading_prefix_cache: Some(wanted.prompt_logprobs.is_some()),
        thinking_token_budget: thinking_budget(shared)?,
    })
}

fn extra_args(shared: &Shared) -> Result<String, ApiError> {
    let Some(raw) = &shared.vllm_xargs else {
        return Ok(String::new());
    };
    if !raw.get().starts_with('{') {
        return Err(ApiError::invalid(
            "vllm_xargs",
            "vllm_xargs: expected an object",
        ));
    }
    Ok(raw.get().to_owned())
}
