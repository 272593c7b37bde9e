//! Which tokens may be chosen, and which end an answer.

use std::collections::{HashMap, HashSet};

use stator_common::proto::worker::TokenList;
use stator_text::Tokenizer;

use super::Limits;
use crate::openai::error::ApiError;
use crate::openai::request::{Int, Shared};

/// Stop strings per request (vLLM's `VLLM_MAX_STOP_STRINGS`).
const MAX_STOP_STRINGS: usize = 4;
/// Bytes of all stop strings together: they are kept once per choice, and looked for at every token.
const MAX_STOP_BYTES: usize = 64 << 10;
/// Bytes of all bad words together: 32 for each that is allowed, and half a millisecond to tokenize.
const MAX_BAD_WORD_BYTES: usize = 4 << 10;
/// Token sequences that bad words may become (vLLM's `VLLM_MAX_NUM_BAD_WORDS`).
const MAX_BAD_WORDS: usize = 128;

/// Returns the stop strings.
///
/// # Errors
/// Too many, too long, or an empty one.
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
    let bytes: usize = stop.iter().map(String::len).sum();
    if bytes > MAX_STOP_BYTES {
        let message = format!("stop: at most {MAX_STOP_BYTES} bytes, got {bytes}");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop)
}

/// Returns the tokens that end generation besides EOS, and all that do.
pub(super) fn stop_tokens(
    shared: &Shared,
    limits: &Limits<'_>,
    ignore_eos: bool,
) -> Result<(Vec<u32>, Vec<u32>), ApiError> {
    let ids = shared.stop_token_ids.as_deref().unwrap_or(&[]);
    let mut stop = token_ids("stop_token_ids", ids, limits)?;
    let mut seen = HashSet::new();
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

pub(super) fn logit_bias(
    shared: &Shared,
    limits: &Limits<'_>,
) -> Result<HashMap<u32, f32>, ApiError> {
    let biases = shared.logit_bias.as_ref().map_or(&[][..], |bias| &bias.0);
    let entry = |&(id, bias): &(i64, f64)| {
        Ok((
            token_id("logit_bias", id, limits)?,
            bias.clamp(-100.0, 100.0) as f32,
        ))
    };
    biases.iter().map(entry).collect()
}

pub(super) fn allowed_tokens(shared: &Shared, limits: &Limits<'_>) -> Result<Vec<u32>, ApiError> {
    match &shared.allowed_token_ids {
        None => Ok(Vec::new()),
        Some(ids) if ids.is_empty() => Err(ApiError::invalid(
            "allowed_token_ids",
            "allowed_token_ids is empty: no token could be chosen",
        )),
        Some(ids) => {
            let mut ids = token_ids("allowed_token_ids", ids, limits)?;
            let mut seen = HashSet::new();
            ids.retain(|id| seen.insert(*id));
            Ok(ids)
        }
    }
}

/// vLLM's `update_from_tokenizer`: each word as it stands alone, and after a space where that makes
/// another token.
pub(super) fn bad_words(
    shared: &Shared,
    limits: &Limits<'_>,
    tokenizer: &Tokenizer,
) -> Result<Vec<TokenList>, ApiError> {
    let words = shared.bad_words.as_deref().unwrap_or(&[]);
    let invalid = |message: String| ApiError::invalid("bad_words", message);
    let bytes: usize = words.iter().map(String::len).sum();
    if words.len() > MAX_BAD_WORDS || bytes > MAX_BAD_WORD_BYTES {
        return Err(invalid(format!(
            "bad_words: at most {MAX_BAD_WORDS} words of {MAX_BAD_WORD_BYTES} bytes together, got {} of {bytes}",
            words.len()
        )));
    }
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
