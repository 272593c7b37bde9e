//! The `logprobs` object of completions: four lists, one entry per token each.

use bytes::BytesMut;
use serde_json::{Map, Value};
use stator_common::proto::worker::TokenLogprobs;
use stator_text::{LogprobTexts, Tokenizer};

use crate::openai::json;
use crate::openai::logprobs::{candidates, name};

/// How log-probabilities are shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Show {
    /// Candidates besides the chosen token; -1: all.
    pub(super) count: i64,
    pub(super) tokens_as_ids: bool,
}

/// The four lists, as far as they have grown.
#[derive(Debug, Default)]
pub(super) struct Lists {
    offsets: Vec<usize>,
    logprobs: Vec<Option<f64>>,
    tokens: Vec<String>,
    top: Vec<Option<Map<String, Value>>>,
    /// Characters before the next token.
    offset: usize,
}

impl Lists {
    /// Returns empty lists whose first token stands `offset` characters into the answer.
    pub(super) fn at(offset: usize) -> Self {
        Self {
            offset,
            ..Self::default()
        }
    }

    /// Returns the characters before the next token.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// Appends a token that nothing is known about: the first of a prompt.
    pub(super) fn push_unknown(&mut self, tokenizer: &Tokenizer, token: u32, show: Show) {
        let text = tokenizer.decode(&[token], false).unwrap_or_default();
        self.push(
            name(token, &text, show.tokens_as_ids).into_owned(),
            None,
            None,
        );
    }

    /// Appends positions.
    pub(super) fn extend(
        &mut self,
        texts: &mut LogprobTexts,
        positions: &[TokenLogprobs],
        show: Show,
    ) {
        for position in positions {
            let candidates = candidates(texts, position);
            let Some(chosen) = candidates.first() else {
                continue;
            };
            let count = usize::try_from(show.count).map_or(usize::MAX, |count| count + 1);
            let top = candidates.iter().take(count).map(|candidate| {
                let name = name(candidate.token, &candidate.text, show.tokens_as_ids);
                (name.into_owned(), Value::from(candidate.logprob))
            });
            let token = name(chosen.token, &chosen.text, show.tokens_as_ids).into_owned();
            self.push(token, Some(chosen.logprob), Some(top.collect()));
        }
    }

    fn push(&mut self, token: String, logprob: Option<f64>, top: Option<Map<String, Value>>) {
        self.offsets.push(self.offset);
        self.offset += token.chars().count();
        self.tokens.push(token);
        self.logprobs.push(logprob);
        self.top.push(top);
    }

    /// Writes the object.
    pub(super) fn write(&self, out: &mut BytesMut) {
        json::raw(out, "{\"text_offset\":");
        json::write(out, &self.offsets);
        json::raw(out, ",\"token_logprobs\":");
        json::write(out, &self.logprobs);
        json::raw(out, ",\"tokens\":");
        json::write(out, &self.tokens);
        json::raw(out, ",\"top_logprobs\":");
        json::write(out, &self.top);
        json::raw(out, "}");
    }
}
