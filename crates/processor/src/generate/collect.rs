//! The whole answer of a request, for clients that do not stream.

use std::future::poll_fn;

use stator_common::proto::worker::TokenLogprobs;

use super::{Finish, Generation, Piece};
use crate::metrics::Observation;
use crate::openai::ApiError;

/// One choice from its first token to its last.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    /// One per token, where asked for.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// One per prompt token after the first, where asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    /// Prompt tokens that came from a cache.
    pub(crate) cached: Option<u32>,
    /// Present on every choice of a finished answer.
    pub(crate) finish: Option<Finish>,
}

/// Returns what of a prompt came from a cache, for all its choices.
///
/// Choices share the prompt, so those that begin later find it in the cache. vLLM (0.32) counts for the choice
/// that finishes last, which is the longest, and in a stream for the one that begins first.
pub(crate) fn cached(choices: &[Collected]) -> Option<u32> {
    let longest = choices.iter().max_by_key(|choice| choice.tokens.len());
    longest?.cached
}

/// Waits for all choices. Dropping the future cancels them.
///
/// - `look`: is shown every piece with the choice's index and the piece's text.
///
/// # Errors
/// One of the choices failed.
pub(crate) async fn collect(
    mut generation: Generation,
    observation: &mut Observation,
    mut look: impl FnMut(usize, &str, &Piece),
) -> Result<Vec<Collected>, ApiError> {
    let mut choices: Vec<Collected> = Vec::new();
    choices.resize_with(generation.len(), Collected::default);
    let mut text = String::new();
    while let Some(piece) = poll_fn(|cx| generation.poll_piece(cx, &mut text)).await {
        let (index, piece) = piece?;
        observation.tokens(piece.tokens.len());
        look(index, &text, &piece);
        let choice = &mut choices[index];
        choice.text.push_str(&text);
        append(&mut choice.tokens, piece.tokens);
        append(&mut choice.logprobs, piece.logprobs);
        append(&mut choice.prompt_logprobs, piece.prompt_logprobs);
        if let (None, Some(cached)) = (choice.cached, piece.cached) {
            observation.cached(cached);
            choice.cached = Some(cached);
        }
        choice.finish = piece.finish;
    }
    Ok(choices)
}

fn append<T>(to: &mut Vec<T>, mut from: Vec<T>) {
    if to.is_empty() {
        *to = from;
    } else {
        to.append(&mut from);
    }
}
