//! The candidates of a position, as vLLM orders and words them (0.32, `logprobs.py`, `v1/engine/logprobs.py`).

use bytes::BytesMut;
use stator_common::proto::worker::TokenLogprobs;
use stator_text::{LogprobTexts, Tokenizer};

use super::json;

/// What minus infinity is written as, since JSON has no infinities (OpenAI's value).
const LEAST: f64 = -9999.0;

/// One candidate at one position.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    /// Finite, at least -9999.
    pub(crate) logprob: f64,
    /// 1: the most likely.
    pub(crate) rank: u32,
    /// What it says where it stands.
    pub(crate) text: String,
}

/// Returns the candidates of the next position: the chosen one first, then the others, the most likely
/// first, each once.
pub(crate) fn candidates(texts: &mut LogprobTexts, position: &TokenLogprobs) -> Vec<Candidate> {
    let words = texts.position(&position.tokens);
    let mut candidates: Vec<Candidate> = Vec::with_capacity(words.len());
    let tokens = position.tokens.iter().zip(&position.logprobs).zip(words);
    for (i, ((&token, &logprob), text)) in tokens.enumerate() {
        let rank = if i == 0 { position.rank } else { i as u32 };
        match candidates.first_mut() {
            Some(chosen) if chosen.token == token => chosen.rank = rank,
            _ => {
                let logprob = f64::from(logprob).max(LEAST);
                candidates.push(Candidate {
                    token,
                    logprob,
                    rank,
                    text,
                });
            }
        }
    }
    candidates
}

/// Returns how a token is called in an answer: by its text, or as `token_id:7` where the client asked so.
pub(crate) fn name(token: u32, text: &str, as_id: bool) -> std::borrow::Cow<'_, str> {
    if as_id {
        format!("token_id:{token}").into()
    } else {
        text.into()
    }
}

/// Appends the log-probabilities of a prompt: a list with `null` for the first token, then an object of
/// token id to `{"logprob","rank","decoded_token"}` per token.
pub(crate) fn write_prompt(out: &mut BytesMut, tokenizer: &Tokenizer, positions: &[TokenLogprobs]) {
    let mut texts = LogprobTexts::new(tokenizer.clone());
    json::raw(out, "[null");
    for position in positions {
        json::raw(out, ",{");
        for (i, candidate) in candidates(&mut texts, position).iter().enumerate() {
            json::raw(out, if i == 0 { "\"" } else { ",\"" });
            json::number(out, candidate.token);
            json::raw(out, "\":{\"logprob\":");
            json::float(out, candidate.logprob);
            json::raw(out, ",\"rank\":");
            json::number(out, candidate.rank);
            json::raw(out, ",\"decoded_token\":");
            json::string(out, &candidate.text);
            json::raw(out, "}");
        }
        json::raw(out, "}");
    }
    json::raw(out, "]");
}
