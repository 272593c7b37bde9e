//! How many: choices, tokens, candidates; and the ranges of everything that is a number.

use super::{Limits, Wanted};
use crate::openai::error::ApiError;
use crate::openai::request::{Int, Shared};

/// Choices per request, all its prompts together (vLLM's `VLLM_MAX_N_SEQUENCES` is 16384; each is a request of
/// its own here).
pub(crate) const MAX_CHOICES: usize = 1024;

/// Returns the number of choices per prompt.
///
/// # Errors
/// Out of range, or `best_of`, which vLLM no longer has.
pub(crate) fn choices(shared: &Shared) -> Result<usize, ApiError> {
    let n = shared.n.map_or(1, |n| n.0);
    if !(1..=MAX_CHOICES as i64).contains(&n) {
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

/// Returns the most and the fewest tokens to generate, which depend on the prompt's length.
///
/// # Errors
/// Out of range, or more at least than at most.
pub(crate) fn lengths(
    shared: &Shared,
    wanted: &Wanted,
    limits: &Limits<'_>,
) -> Result<(u32, u32), ApiError> {
    let max_tokens = max_tokens(wanted, limits)?;
    let min_tokens = shared.min_tokens.map_or(0, |min| min.0);
    within("min_tokens", "0 or more", min_tokens >= 0, min_tokens)?;
    if min_tokens > i64::from(max_tokens) {
        let message =
            format!("min_tokens must be at most max_tokens={max_tokens}, got {min_tokens}");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok((max_tokens, min_tokens as u32))
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

pub(super) fn logprobs(
    name: &'static str,
    asked: Option<i64>,
    limits: &Limits<'_>,
) -> Result<Option<i32>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    within(name, "0 or more, or -1 for all", asked >= -1, asked)?;
    let vocab = i64::from(limits.vocab_size);
    let count = if asked == -1 { vocab } else { asked };
    // More candidates than tokens kill the engine, whatever the worker was told to allow.
    let max = match limits.max_logprobs {
        -1 => vocab,
        max => vocab.min(i64::from(max)),
    };
    if count > max {
        return Err(ApiError::invalid(
            name,
            format!("{name} can be {max} at most, got {count}"),
        ));
    }
    Ok(Some(asked as i32))
}

pub(super) fn thinking_budget(shared: &Shared) -> Result<Option<u32>, ApiError> {
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

pub(super) fn within<T: std::fmt::Display>(
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
