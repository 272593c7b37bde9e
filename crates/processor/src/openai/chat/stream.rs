//! A chat completion's answer as events.

use bytes::BytesMut;
use stator_text::LogprobTexts;

use super::convert::Answer;
use super::logprobs;
use super::reader::{CallDelta, Reader};
use super::tools::Wish;
use crate::config::ReasoningField;
use crate::generate::{Finish, Format, Piece, Reason};
use crate::models::Model;
use crate::openai::common::StreamUsage;
use crate::openai::completions::write_stop;
use crate::openai::json;
use crate::openai::usage::Usage;

/// Writes the events of one request.
pub(super) struct Stream {
    answer: Answer,
    usage: StreamUsage,
    reasoning_field: ReasoningField,
    /// The beginning of every event.
    head: BytesMut,
    choices: Vec<State>,
    cached: Option<u32>,
}

/// What an event needs to know of those before it.
struct State {
    reader: Reader,
    tokens: usize,
    called: bool,
    texts: LogprobTexts,
}

impl Stream {
    pub(super) fn new(
        answer: Answer,
        model: &Model,
        usage: StreamUsage,
        readers: Vec<Reader>,
        reasoning_field: ReasoningField,
    ) -> Self {
        let tokenizer = &model.assets.tokenizer;
        let state = |reader| State {
            reader,
            tokens: 0,
            called: false,
            texts: LogprobTexts::new(tokenizer.clone()),
        };
        Self {
            head: answer.head.event("chat.completion.chunk"),
            choices: readers.into_iter().map(state).collect(),
            answer,
            usage,
            reasoning_field,
            cached: None,
        }
    }

    /// Writes an event up to the content of its delta.
    fn open(&self, choice: usize, out: &mut BytesMut) {
        out.extend_from_slice(&self.head);
        json::raw(out, "{\"index\":");
        json::number(out, choice);
        json::raw(out, ",\"delta\":{");
    }

    /// Writes what follows the choice in an event.
    fn close(&self, choice: usize, out: &mut BytesMut) {
        json::raw(out, "}]");
        if self.usage == StreamUsage::Continuous {
            json::raw(out, ",\"usage\":");
            let completion = self.choices[choice].tokens;
            Usage {
                prompt: self.answer.prompt.tokens.len(),
                completion,
                ..Usage::default()
            }
            .write(out);
        }
        json::raw(out, "}\n\n");
    }

    /// Writes the fields of a delta for text that means something. Says whether there are any.
    fn parsed(&mut self, choice: usize, text: &str, piece: &Piece, out: &mut BytesMut) -> bool {
        let state = &mut self.choices[choice];
        let mut parsed = state
            .reader
            .push(text, &piece.tokens, piece.finish.is_some());
        state.called |= !parsed.calls.is_empty();
        if !self.answer.include_reasoning {
            parsed.reasoning.clear();
        }
        if !self.answer.parallel_tool_calls {
            parsed.calls.retain(|call| call.index == 0);
        }
        let mut comma = "";
        if !parsed.content.is_empty() {
            json::raw(out, "\"content\":");
            json::string(out, &parsed.content);
            comma = ",";
        }
        if !parsed.reasoning.is_empty() {
            json::raw(out, comma);
            json::raw(out, "\"");
            json::raw(out, self.reasoning_field.as_str());
            json::raw(out, "\":");
            json::string(out, &parsed.reasoning);
            comma = ",";
        }
        if !parsed.calls.is_empty() {
            json::raw(out, comma);
            json::raw(out, "\"tool_calls\":");
            json::list(out, &parsed.calls, |out, call| write_call(out, call, true));
        }
        !(parsed.content.is_empty() && parsed.reasoning.is_empty() && parsed.calls.is_empty())
    }

    fn thought(&self) -> Option<usize> {
        let each = self
            .choices
            .iter()
            .filter_map(|choice| choice.reader.thought());
        each.reduce(|a, b| a + b)
    }

    fn finish_reason(&self, choice: usize, finish: &Finish) -> &'static str {
        let called = self.choices[choice].called && self.answer.wish != Wish::Named;
        if called && finish.reason == Reason::Stop {
            "tool_calls"
        } else {
            finish.reason.as_str()
        }
    }
}

impl Format for Stream {
    fn begin(&mut self, out: &mut BytesMut) {
        for choice in 0..self.choices.len() {
            self.open(choice, out);
            json::raw(out, "\"role\":");
            json::string(out, &self.answer.role);
            json::raw(
                out,
                ",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]",
            );
            if self.answer.return_token_ids {
                json::raw(out, ",\"prompt_token_ids\":");
                json::write(out, &self.answer.prompt.tokens);
            }
            if let Some(text) = self
                .answer
                .prompt
                .text
                .as_ref()
                .filter(|_| self.answer.return_prompt_text)
            {
                json::raw(out, ",\"prompt_text\":");
                json::string(out, text);
            }
            if self.usage == StreamUsage::Continuous {
                json::raw(out, ",\"usage\":");
                Usage {
                    prompt: self.answer.prompt.tokens.len(),
                    ..Usage::default()
                }
                .write(out);
            }
            json::raw(out, "}\n\n");
        }
        if self.answer.echo.is_empty() {
            return;
        }
        for choice in 0..self.choices.len() {
            self.open(choice, out);
            json::raw(out, "\"content\":");
            json::string(out, &self.answer.echo);
            json::raw(out, "},\"logprobs\":null,\"finish_reason\":null");
            self.close(choice, out);
        }
    }

    fn piece(&mut self, choice: usize, text: &str, piece: Piece, out: &mut BytesMut) {
        self.cached = self.cached.or(piece.cached);
        let state = &mut self.choices[choice];
        state.tokens += piece.tokens.len();
        let plain = state.reader.is_plain();
        let metadata = self.answer.include_reasoning || !state.reader.has_parser();
        let logprobs = self.answer.logprobs.filter(|_| metadata);
        let token_ids = self.answer.return_token_ids && metadata;

        let start = out.len();
        self.open(choice, out);
        if plain {
            json::raw(out, "\"content\":");
            json::string(out, text);
        } else {
            let meant = self.parsed(choice, text, &piece, out);
            if !meant && piece.finish.is_none() && logprobs.is_none() && !token_ids {
                // The text is part of a marker, or held until its meaning is clear.
                out.truncate(start);
                return;
            }
        }
        match logprobs {
            Some(count) => {
                json::raw(out, "},\"logprobs\":");
                let texts = &mut self.choices[choice].texts;
                logprobs::write(
                    out,
                    texts,
                    &piece.logprobs,
                    count,
                    self.answer.tokens_as_ids,
                );
            }
            None => json::raw(out, "},\"logprobs\":null"),
        }
        match &piece.finish {
            Some(finish) => {
                json::raw(out, ",\"finish_reason\":\"");
                json::raw(out, self.finish_reason(choice, finish));
                json::raw(out, "\",\"stop_reason\":");
                write_stop(out, finish.stop.as_ref());
            }
            None => json::raw(out, ",\"finish_reason\":null"),
        }
        if token_ids {
            json::raw(out, ",\"token_ids\":");
            json::write(out, &piece.tokens);
        }
        self.close(choice, out);
    }

    fn end(&mut self, out: &mut BytesMut) {
        if self.usage == StreamUsage::Never {
            return;
        }
        let usage = Usage {
            prompt: self.answer.prompt.tokens.len(),
            completion: self.choices.iter().map(|choice| choice.tokens).sum(),
            cached: self.cached,
            reasoning: self.thought(),
        };
        out.extend_from_slice(&self.head);
        json::raw(out, "],\"usage\":");
        usage.write(out);
        json::raw(out, "}\n\n");
    }
}

/// Writes a tool call, or what is added to one.
///
/// - `indexed`: say which call it is, as deltas do.
pub(super) fn write_call(out: &mut BytesMut, call: &CallDelta, indexed: bool) {
    json::raw(out, "{");
    if call.name.is_some() {
        let random = || format!("chatcmpl-tool-{:016x}", rand::random::<u64>());
        json::raw(out, "\"id\":");
        json::string(out, &call.id.clone().unwrap_or_else(random));
        json::raw(out, ",\"type\":\"function\",");
    }
    if indexed {
        json::raw(out, "\"index\":");
        json::number(out, call.index);
        json::raw(out, ",");
    }
    json::raw(out, "\"function\":{");
    if let Some(name) = &call.name {
        json::raw(out, "\"name\":");
        json::string(out, name);
    }
    if let Some(arguments) = &call.arguments {
        json::raw(out, if call.name.is_some() { "," } else { "" });
        json::raw(out, "\"arguments\":");
        json::string(out, arguments);
    }
    json::raw(out, "}}");
}
