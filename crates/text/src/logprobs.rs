//! The text of single tokens, for log-probabilities.
//!
//! A token may be part of a character; on its own it decodes to U+FFFD. As vLLM does
//! (`v1/engine/logprobs.py`, `LogprobsProcessor`), such a token is decoded after the tokens that were
//! really sampled before it: the one that completes the character gets it whole, the ones before get nothing.
//! The bytes that OpenAI's API asks for are those of this text.

use crate::tokenizer::Tokenizer;

/// Sampled tokens that are looked back at: no character has more parts.
const CONTEXT: usize = 4;

/// The texts of one stream's tokens, position by position.
#[derive(Debug)]
pub struct LogprobTexts {
    tokenizer: Tokenizer,
    /// The last sampled tokens, oldest first.
    context: Vec<u32>,
}

impl LogprobTexts {
    /// Returns the state before the first position. Prompt and answer have one each.
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self {
            tokenizer,
            context: Vec::with_capacity(CONTEXT),
        }
    }

    /// Returns the texts of the next position's tokens.
    ///
    /// - `tokens`: the sampled token (in a prompt: the token itself) in front, then the alternatives.
    pub fn position(&mut self, tokens: &[u32]) -> Vec<String> {
        let texts = tokens.iter().map(|token| self.text(*token)).collect();
        if let Some(sampled) = tokens.first() {
            if self.context.len() == CONTEXT {
                self.context.remove(0);
            }
            self.context.push(*sampled);
        }
        texts
    }

    fn text(&self, token: u32) -> String {
        let text = self.tokenizer.token_text(token);
        match is_cut(&text) {
            true => self.completed(token),
            false => text,
        }
    }

    /// Returns what `token` adds to the sampled tokens before it; empty if that is still no character.
    fn completed(&self, token: u32) -> String {
        for count in 1..=self.context.len() {
            let context = &self.context[self.context.len() - count..];
            let full = self.decode(&[context, &[token]].concat());
            if is_cut(&full) {
                continue;
            }
            // Sampled tokens that were cut said nothing themselves; their share is this token's.
            let clean = context
                .iter()
                .rposition(|token| !is_cut(&self.decode(&[*token])));
            let prefix = self.decode(&context[..clean.map_or(0, |last| last + 1)]);
            return match full.strip_prefix(&prefix) {
                Some(rest) => rest.to_owned(),
                None => {
                    let common = prefix
                        .chars()
                        .zip(full.chars())
                        .take_while(|(a, b)| a == b)
                        .count();
                    full.chars().skip(common).collect()
                }
            };
        }
        String::new()
    }

    fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, false).unwrap_or_default()
    }
}

fn is_cut(text: &str) -> bool {
    text.ends_with(char::REPLACEMENT_CHARACTER)
}
