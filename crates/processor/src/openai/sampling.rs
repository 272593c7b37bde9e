//! From the shared request fields to the engine's sampling parameters.
//!
//! Ranges, defaults and their order (request, then `generation_config.json`, then OpenAI's) are vLLM's
//! (0.32, `sampling_params.py`), checked here so that the answer names the field; the engine client checks
//! again what could harm an engine.

use std::collections::HashMap;

use stator_common::proto::worker::{Sampling, TokenList};
use stator_text::Tokenizer;

use crate::models::GenerationConfig;
use crate::openai::error::ApiError;
use crate::openai::request::{Int, Shared};
use crate::openai::structured;

/// Below this a temperature means greedy (vLLM's `_SAMPLING_EPS`).
const GREEDY: f64 = 1e-5;
/// Smallest temperature that is not greedy; smaller ones are raised to it (vLLM's `_MAX_TEMP`).
const MIN_TEMPERATURE: f64 = 1e-2;
/// Stop strings per request (vLLM's `VLLM_MAX_STOP_STRINGS`).
const MAX_STOP_STRINGS: usize = 4;
/// Token sequences that bad words may become (vLLM's `VLLM_MAX_NUM_BAD_WORDS`).
const MAX_BAD_WORDS: usize = 128;
/// Choices per prompt (vLLM's `VLLM_MAX_N_SEQUENCES` is 16384; each is a request of its own here).
const MAX_CHOICES: i64 = 1024;

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

/// Returns the number of choices per prompt.
///
/// # Errors
/// Out of range, or `best_of`, which vLLM no longer has.
pub(crate) fn choices(shared: &Shared) -> Result<usize, ApiError> {
    let n = shared.n.map_or(1, |n| n.0);
    if !(1..=MAX_CHOICES).contains(&n) {
        return Err(ApiError::invalid(
            "n",
            format!("n must be between 1 and {MAX_CHOICES}, got {n}"),
        ));
    }
    match shared.best_of {
        Some(Int(best_of)) if best_of != n => Err(ApiError::invalid(
            "best_of",
            "best_of is not supported, use n",
        )),
        _ => Ok(n as usize),
    }
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

    let max_tokens = max_tokens(wanted, limits)?;
    let min_tokens = shared.min_tokens.map_or(0, |min| min.0);
    within("min_tokens", "0 or more", min_tokens >= 0, min_tokens)?;
    if min_tokens > i64::from(max_tokens) {
        let message =
            format!("min_tokens must be at most max_tokens={max_tokens}, got {min_tokens}");
        return Err(ApiError::invalid("min_tokens", message));
    }
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
        min_tokens: min_tokens as u32,
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

/// Returns the stop strings.
///
/// # Errors
/// Too many, or an empty one.
pub(crate) fn stop_strings(shared: &Shared) -> Result<&[String], ApiError> {
    let stop = shared.stop.as_ref().map_or(&[][..], |stop| &stop.0);
    if stop.len() > MAX_STOP_STRINGS {
        let message = format!(
            "stop: at most {MAX_STOP_STRINGS} strings, got {}",
            stop.len()
        );
        return Err(ApiError::invalid("stop", message));
    }
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::invalid(
            "stop",
            "stop cannot contain an empty string",
        ));
    }
    Ok(stop)
}

fn within<T: std::fmt::Display>(
    name: &'static str,
    range: &str,
    holds: bool,
    value: T,
) -> Result<(), ApiError> {
    if holds {
        return Ok(());
    }
    Err(ApiError::invalid(
        name,
        format!("{name} must be {range}, got {value}"),
    ))
}

/// vLLM's `get_max_tokens`: what is asked for, or the model's preference, within what the context leaves.
fn max_tokens(wanted: &Wanted, limits: &Limits<'_>) -> Result<u32, ApiError> {
    let name = wanted.max_tokens_field;
    let context = i64::from(limits.max_model_len);
    if let Some(asked) = wanted.max_tokens {
        within(name, "at least 1", asked >= 1, asked)?;
        if asked > context {
            let message = format!("{name}={asked} cannot be greater than max_model_len={context}");
            return Err(ApiError::invalid(name, message));
        }
    }
    let left = context - wanted.prompt_len as i64;
    let asked = wanted
        .max_tokens
        .or(limits.generation.max_tokens.map(i64::from))
        .unwrap_or(left);
    Ok(asked.min(left).max(1) as u32)
}

/// Returns the tokens that end generation besides EOS, and all that do.
fn stop_tokens(
    shared: &Shared,
    limits: &Limits<'_>,
    ignore_eos: bool,
) -> Result<(Vec<u32>, Vec<u32>), ApiError> {
    let ids = shared.stop_token_ids.as_deref().unwrap_or(&[]);
    let mut stop = token_ids("stop_token_ids", ids, limits)?;
    let mut seen = std::collections::HashSet::new();
    stop.retain(|id| seen.insert(*id));
    let more = limits.generation.eos_token_ids.iter().copied();
    let more = more
        .filter(|id| Some(*id) != limits.eos_token_id)
        .filter(|id| seen.insert(*id));
    let more: Vec<u32> = more.collect();
    let mut all = stop.clone();
    all.extend(&more);
    all.extend(limits.eos_token_id.filter(|id| seen.insert(*id)));
    if !ignore_eos {
        stop.extend(more);
    }
    Ok((stop, all))
}

fn token_ids(name: &'static str, ids: &[Int], limits: &Limits<'_>) -> Result<Vec<u32>, ApiError> {
    ids.iter().map(|id| token_id(name, id.0, limits)).collect()
}

fn token_id(name: &'static str, id: i64, limits: &Limits<'_>) -> Result<u32, ApiError> {
    u32::try_from(id)
        .ok()
        .filter(|&id| id < limits.vocab_size)
        .ok_or_else(|| {
            let message = format!(
                "{name}: token id {id} is not in the vocabulary of {}",
                limits.vocab_size
            );
            ApiError::invalid(name, message)
        })
}

fn logprobs(
    name: &'static str,
    asked: Option<i64>,
    limits: &Limits<'_>,
) -> Result<Option<i32>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    within(name, "0 or more, or -1 for all", asked >= -1, asked)?;
    let vocab = i64::from(limits.vocab_size);
    let count = if asked == -1 { vocab } else { asked };
    let max = if limits.max_logprobs == -1 {
        vocab
    } else {
        i64::from(limits.max_logprobs)
    };
    if count > max {
        return Err(ApiError::invalid(
            name,
            format!("{name} can be {max} at most, got {count}"),
        ));
    }
    Ok(Some(asked as i32))
}

fn logit_bias(shared: &Shared, limits: &Limits<'_>) -> Result<HashMap<u32, f32>, ApiError> {
    let biases = shared.logit_bias.as_ref().map_or(&[][..], |bias| &bias.0);
    let entry = |&(id, bias): &(i64, f64)| {
        Ok((
            token_id("logit_bias", id, limits)?,
            bias.clamp(-100.0, 100.0) as f32,
        ))
    };
    biases.iter().map(entry).collect()
}

fn allowed_tokens(shared: &Shared, limits: &Limits<'_>) -> Result<Vec<u32>, ApiError> {
    match &shared.allowed_token_ids {
        None => Ok(Vec::new()),
        Some(ids) if ids.is_empty() => Err(ApiError::invalid(
            "allowed_token_ids",
            "allowed_token_ids is empty: no token could be chosen",
        )),
        Some(ids) => token_ids("allowed_token_ids", ids, limits),
    }
}

/// vLLM's `update_from_tokenizer`: each word as it stands alone, and after a space where that makes
/// another token.
fn bad_words(
    shared: &Shared,
    limits: &Limits<'_>,
    tokenizer: &Tokenizer,
) -> Result<Vec<TokenList>, ApiError> {
    let words = shared.bad_words.as_deref().unwrap_or(&[]);
    let invalid = |message: String| ApiError::invalid("bad_words", message);
    let encode = |text: &str| {
        let tokens = tokenizer.encode(text, false);
        tokens.map_err(|error| invalid(format!("bad_words: {error}")))
    };
    let mut lists: Vec<TokenList> = Vec::new();
    for (i, word) in words.iter().enumerate() {
        if words[..i].contains(word) {
            continue;
        }
        let word = word.trim_start();
        let alone = encode(word)?;
        if alone.is_empty() {
            return Err(invalid(
                "bad_words must be at least one token each".to_owned(),
            ));
        }
        let spaced = encode(&format!(" {word}"))?;
        let differs = spaced.first() != alone.first() && spaced.len() == alone.len();
        lists.push(TokenList { tokens: alone });
        if differs {
            lists.push(TokenList { tokens: spaced });
        }
        if lists.len() > MAX_BAD_WORDS {
            return Err(invalid(format!(
                "bad_words can make {MAX_BAD_WORDS} token sequences at most"
            )));
        }
    }
    let mut tokens = lists.iter().flat_map(|list| &list.tokens);
    if let Some(id) = tokens.find(|&&id| id >= limits.vocab_size) {
        return Err(invalid(format!(
            "bad_words: token id {id} is not in the vocabulary"
        )));
    }
    Ok(lists)
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

fn thinking_budget(shared: &Shared) -> Result<Option<u32>, ApiError> {
    let name = "thinking_token_budget";
    match shared.thinking_token_budget {
        None | Some(Int(-1)) => Ok(None),
        Some(Int(budget)) => u32::try_from(budget).map(Some).map_err(|_| {
            ApiError::invalid(
                name,
                format!("{name} must be 0 or more, or -1 for no limit, got {budget}"),
            )
        }),
    }
}
