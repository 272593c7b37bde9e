//! Sampling parameters: their ranges, and what vLLM's front end makes of them.

use super::{Invalid, Limits};
use crate::request::{Request, Sampling};

/// A min-p up to this counts as none (`_SAMPLING_EPS`, sampling_params.py).
const NO_MIN_P: f64 = 1e-5;
/// Temperatures between 0 (greedy) and this are raised to it (`_MAX_TEMP`, sampling_params.py).
const LOWEST_TEMPERATURE: f64 = 1e-2;
/// Rows of the V2 model runner's sampler (v1/worker/gpu/sample/logit_bias.py); more of them
/// ends the engine, and vLLM's front end does not check.
const MAX_ALLOWED_TOKEN_IDS: usize = 1024;
const MAX_LOGIT_BIAS: usize = 1024;
/// The same for stop tokens, where `min_tokens` masks them.
const MAX_STOP_TOKEN_IDS: usize = 128;
/// Defaults of `VLLM_MAX_NUM_BAD_WORDS` and `VLLM_MAX_BAD_WORDS_TOTAL_TOKENS` (envs.py).
const MAX_BAD_WORDS: usize = 128;
const MAX_BAD_WORDS_TOKENS: usize = 1024;

pub(super) fn check(request: &mut Request, limits: &Limits) -> Result<(), Invalid> {
    let room = limits.max_model_len - request.prompt.len() as u32;
    let sampling = &mut request.sampling;
    lengths(sampling, room)?;
    distribution(sampling, limits)?;
    penalties(sampling)?;
    token_ids(sampling, limits)?;
    stop_tokens(sampling, limits)?;
    logprobs(sampling, limits)?;
    if sampling.thinking_token_budget.is_some() && !limits.reasoning {
        return Err(Invalid::new(
            "thinking_token_budget",
            "the engine runs without a reasoning parser",
        ));
    }
    Ok(())
}

fn lengths(sampling: &mut Sampling, room: u32) -> Result<(), Invalid> {
    if sampling.max_tokens == 0 {
        return Err(Invalid::new("max_tokens", "must be at least 1, got 0"));
    }
    sampling.max_tokens = sampling.max_tokens.min(room);
    if sampling.min_tokens > sampling.max_tokens {
        return Err(Invalid::new(
            "min_tokens",
            format!(
                "must not exceed max_tokens={}, got {}",
                sampling.max_tokens, sampling.min_tokens
            ),
        ));
    }
    Ok(())
}

fn distribution(sampling: &mut Sampling, limits: &Limits) -> Result<(), Invalid> {
    let temperature = sampling.temperature.unwrap_or(1.0);
    if !(0.0..=2.0).contains(&temperature) {
        return Err(out_of_range("temperature", "[0, 2]", temperature));
    }
    let top_p = sampling.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(out_of_range("top_p", "(0, 1]", top_p));
    }
    let min_p = sampling.min_p.unwrap_or(0.0);
    if !(0.0..=1.0).contains(&min_p) {
        return Err(out_of_range("min_p", "[0, 1]", min_p));
    }
    let top_k = sampling.top_k.unwrap_or(0);
    if top_k < -1 {
        return Err(Invalid::new(
            "top_k",
            format!("must be 0 (all tokens) or at least 1, got {top_k}"),
        ));
    }
    if limits.speculative && min_p > NO_MIN_P {
        return Err(Invalid::new(
            "min_p",
            "is not supported with speculative decoding",
        ));
    }
    sampling.seed = sampling.seed.filter(|seed| *seed != -1);
    // The sampler keeps top-k as i32 and takes anything beyond the vocabulary as "all tokens".
    let top_k = (1..i64::from(limits.vocab_size))
        .contains(&top_k)
        .then_some(top_k);
    if temperature < LOWEST_TEMPERATURE && temperature > 0.0 {
        sampling.temperature = Some(LOWEST_TEMPERATURE);
    }
    (sampling.top_p, sampling.top_k, sampling.min_p) = if temperature == 0.0 {
        (None, None, None)
    } else {
        (sampling.top_p, top_k, sampling.min_p)
    };
    Ok(())
}

fn penalties(sampling: &Sampling) -> Result<(), Invalid> {
    for (field, value) in [
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ] {
        let value = value.unwrap_or(0.0);
        if !(-2.0..=2.0).contains(&value) {
            return Err(out_of_range(field, "[-2, 2]", value));
        }
    }
    let repetition = sampling.repetition_penalty.unwrap_or(1.0);
    // Beyond f32 the sampler would divide by infinity.
    if !(repetition > 0.0 && repetition <= f64::from(f32::MAX)) {
        return Err(out_of_range(
            "repetition_penalty",
            "(0, 3.4e38]",
            repetition,
        ));
    }
    Ok(())
}

fn token_ids(sampling: &mut Sampling, limits: &Limits) -> Result<(), Invalid> {
    in_vocabulary(
        "allowed_token_ids",
        sampling.allowed_token_ids.iter(),
        limits,
    )?;
    at_most(
        "allowed_token_ids",
        sampling.allowed_token_ids.len(),
        MAX_ALLOWED_TOKEN_IDS,
    )?;

    in_vocabulary(
        "logit_bias",
        sampling.logit_bias.iter().map(|(id, _)| id),
        limits,
    )?;
    at_most("logit_bias", sampling.logit_bias.len(), MAX_LOGIT_BIAS)?;
    if limits.speculative && !sampling.logit_bias.is_empty() {
        return Err(Invalid::new(
            "logit_bias",
            "is not supported with speculative decoding",
        ));
    }
    for (id, bias) in &mut sampling.logit_bias {
        if bias.is_nan() {
            return Err(Invalid::new("logit_bias", format!("of token {id} is NaN")));
        }
        *bias = bias.clamp(-100.0, 100.0);
    }

    if sampling.bad_words.iter().any(Vec::is_empty) {
        return Err(Invalid::new("bad_words", "holds an empty sequence"));
    }
    in_vocabulary("bad_words", sampling.bad_words.iter().flatten(), limits)?;
    at_most("bad_words", sampling.bad_words.len(), MAX_BAD_WORDS)?;
    at_most(
        "bad_words",
        sampling.bad_words.iter().map(Vec::len).sum(),
        MAX_BAD_WORDS_TOKENS,
    )
}

/// Completes the stop tokens as `SamplingParams.update_from_generation_config` does: the model's
/// further end-of-sequence tokens stop generation too, unless the request ignores them.
fn stop_tokens(sampling: &mut Sampling, limits: &Limits) -> Result<(), Invalid> {
    in_vocabulary("stop_token_ids", sampling.stop_token_ids.iter(), limits)?;
    // Ends of sequence come from the model's files; one beyond the logits can never be sampled,
    // and as a column index it would end the engine.
    let eos = sampling.eos_token_id.filter(|id| *id < limits.vocab_size);
    let mut ends = std::mem::take(&mut sampling.all_stop_token_ids);
    ends.retain(|id| *id < limits.vocab_size && Some(*id) != eos);
    if !sampling.ignore_eos {
        sampling.stop_token_ids.extend(&ends);
    }
    sampling.eos_token_id = eos.filter(|_| !sampling.ignore_eos);
    ends.extend(&sampling.stop_token_ids);
    ends.extend(eos);
    for ids in [&mut sampling.stop_token_ids, &mut ends] {
        ids.sort_unstable();
        ids.dedup();
    }
    sampling.all_stop_token_ids = ends;
    if sampling.min_tokens == 0 {
        return Ok(());
    }
    at_most(
        "stop_token_ids",
        sampling.all_stop_token_ids.len(),
        MAX_STOP_TOKEN_IDS,
    )
}

fn logprobs(sampling: &mut Sampling, limits: &Limits) -> Result<(), Invalid> {
    let vocabulary = i64::from(limits.vocab_size);
    let limit = match limits.max_logprobs {
        -1 => vocabulary,
        // More than there are tokens ends the engine, and vLLM's front end does not check.
        limit => limit.min(vocabulary),
    };
    for (field, asked) in [
        ("logprobs", sampling.logprobs),
        ("prompt_logprobs", sampling.prompt_logprobs),
    ] {
        let asked = match asked.map(i64::from) {
            None => continue,
            Some(-1) => vocabulary,
            Some(asked) => asked,
        };
        if !(0..=limit).contains(&asked) {
            return Err(Invalid::new(
                field,
                format!("must be between 0 and {limit}, got {asked}"),
            ));
        }
    }
    if sampling.prompt_logprobs.is_some() {
        // Tokens from the cache would have no log-probabilities.
        sampling.skip_reading_prefix_cache = Some(true);
    }
    Ok(())
}

fn out_of_range(field: &'static str, range: &str, value: f64) -> Invalid {
    Invalid::new(field, format!("must be in {range}, got {value}"))
}

fn at_most(field: &'static str, count: usize, limit: usize) -> Result<(), Invalid> {
    if count <= limit {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        format!("{count} entries, the limit is {limit}"),
    ))
}

fn in_vocabulary<'a>(
    field: &'static str,
    mut ids: impl Iterator<Item = &'a u32>,
    limits: &Limits,
) -> Result<(), Invalid> {
    match ids.find(|id| **id >= limits.vocab_size) {
        None => Ok(()),
        Some(id) => Err(Invalid::new(
            field,
            format!(
                "token id {id} is not below the vocabulary's size of {}",
                limits.vocab_size
            ),
        )),
    }
}
