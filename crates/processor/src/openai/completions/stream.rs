//! A completion's answer as events.

use std::sync::Arc;

use bytes::BytesMut;
use stator_text::LogprobTexts;

use super::convert::{Answer, Echo};
use super::full::write_stop;
use super::logprobs::{Lists, Show};
use crate::generate::{Format, Piece};
use crate::models::Model;
use crate::openai::common::StreamUsage;
use crate::openai::json;
use crate::openai::usage::Usage;

/// Writes the events of one request.
pub(super) struct Stream {
    answer: Answer,
    model: Arc<Model>,
    usage: StreamUsage,
    /// The beginning of every event.
    head: BytesMut,
    choices: Vec<State>,
    /// Of each prompt, as far as the engine said.
    cached: Vec<Option<u32>>,
}

/// What an event needs to know of those before it.
struct State {
    tokens: usize,
    /// Whether the prompt was shown.
    begun: bool,
    /// Characters of the log-probabilities' tokens so far.
    offset: usize,
    texts: LogprobTexts,
}

impl Stream {
    pub(super) fn new(answer: Answer, model: Arc<Model>, usage: StreamUsage) -> Self {
        let tokenizer = &model.assets.tokenizer;
        let state = || State {
            tokens: 0,
            begun: false,
            offset: 0,
            texts: LogprobTexts::new(tokenizer.clone()),
        };
        let mut choices = Vec::new();
        choices.resize_with(answer.prompts.len() * answer.n, state);
        Self {
            head: answer.head.event("text_completion"),
            cached: vec![None; answer.prompts.len()],
            choices,
            usage,
            model,
            answer,
        }
    }

    fn lists(&mut self, choice: usize, first: bool, piece: &Piece, count: i64) -> Lists {
        let show = Show {
            count,
            tokens_as_ids: self.answer.tokens_as_ids,
        };
        let tokenizer = &self.model.assets.tokenizer;
        let state = &mut self.choices[choice];
        let mut lists = Lists::at(state.offset);
        if first && self.answer.echo != Echo::No {
            let (_, prompt) = self.answer.prompt(choice);
            lists.push_unknown(tokenizer, prompt.tokens[0], show);
            lists.extend(
                &mut LogprobTexts::new(tokenizer.clone()),
                &piece.prompt_logprobs,
                show,
            );
        }
        if self.answer.echo != Echo::Only {
            lists.extend(&mut state.texts, &piece.logprobs, show);
        }
        state.offset = lists.offset();
        lists
    }
}

impl Format for Stream {
    fn begin(&mut self, _: &mut BytesMut) {}

    fn piece(&mut self, choice: usize, text: &str, piece: Piece, out: &mut BytesMut) {
        let (prompt_index, _) = self.answer.prompt(choice);
        let known = &mut self.cached[prompt_index];
        *known = known.or(piece.cached);
        let first = !std::mem::replace(&mut self.choices[choice].begun, true);
        self.choices[choice].tokens += piece.tokens.len();
        let lists = self
            .answer
            .logprobs
            .map(|count| self.lists(choice, first, &piece, count));
        let (_, prompt) = self.answer.prompt(choice);

        out.extend_from_slice(&self.head);
        json::raw(out, "{\"index\":");
        json::number(out, choice);
        json::raw(out, ",\"text\":");
        if first && self.answer.echo != Echo::No {
            // A prompt that cannot be decoded is shown as nothing: its tokens came from the client.
            let prompt = self.answer.echoed(prompt, &self.model).unwrap_or_default();
            let rest = if self.answer.echo == Echo::Only {
                ""
            } else {
                text
            };
            json::string(out, &(prompt + rest));
        } else if self.answer.echo == Echo::Only {
            json::string(out, "");
        } else {
            json::string(out, text);
        }
        match lists {
            Some(lists) => {
                json::raw(out, ",\"logprobs\":");
                lists.write(out);
            }
            None => json::raw(out, ",\"logprobs\":null"),
        }
        match &piece.finish {
            Some(finish) => {
                json::raw(out, ",\"finish_reason\":\"");
                json::raw(out, finish.reason.as_str());
                json::raw(out, "\",\"stop_reason\":");
                write_stop(out, finish.stop.as_ref());
            }
            None => json::raw(out, ",\"finish_reason\":null,\"stop_reason\":null"),
        }
        if first && (self.answer.return_token_ids || self.answer.echo != Echo::No) {
            json::raw(out, ",\"prompt_token_ids\":");
            json::write(out, &prompt.tokens);
        }
        if self.answer.return_token_ids {
            json::raw(out, ",\"token_ids\":");
            json::write(out, &piece.tokens);
        }
        json::raw(out, "}]");
        if self.usage == StreamUsage::Continuous {
            json::raw(out, ",\"usage\":");
            let completion = self.choices[choice].tokens;
            Usage {
                prompt: prompt.tokens.len(),
                completion,
                ..Usage::default()
            }
            .write(out);
        }
        json::raw(out, "}\n\n");
    }

    fn end(&mut self, out: &mut BytesMut) {
        if self.usage == StreamUsage::Never {
            return;
        }
        let usage = Usage {
            prompt: self
                .answer
                .prompts
                .iter()
                .map(|prompt| prompt.tokens.len())
                .sum(),
            completion: self.choices.iter().map(|choice| choice.tokens).sum(),
            cached: self.cached.iter().copied().flatten().reduce(|a, b| a + b),
            reasoning: None,
        };
        out.extend_from_slice(&self.head);
        json::raw(out, "],\"usage\":");
        usage.write(out);
        json::raw(out, "}\n\n");
    }
}
