//! A chat completion's answer in one piece.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use stator_text::LogprobTexts;

use super::convert::Answer;
use super::reader::{CallDelta, Parsed, Reader};
use super::tools::Wish;
use super::{logprobs, stream};
use crate::config::ReasoningField;
use crate::generate::{Collected, Reason, cached};
use crate::models::Model;
use crate::openai::completions::write_stop;
use crate::openai::json;
use crate::openai::logprobs::write_prompt;
use crate::openai::usage::Usage;

/// The choices of an answer, and how to read them.
pub(super) struct Read<'a> {
    /// All of them, finished.
    pub(super) choices: &'a [Collected],
    /// One per choice.
    pub(super) readers: Vec<Reader>,
    /// Tokens that were thoughts, where somebody looked.
    pub(super) thought: Option<usize>,
}

/// Writes the answer.
pub(super) fn response(
    answer: &Answer,
    model: &Model,
    read: Read<'_>,
    reasoning_field: ReasoningField,
) -> Response {
    let Read {
        choices,
        readers,
        thought,
    } = read;
    let mut out = BytesMut::with_capacity(1024);
    let usage = Usage {
        reasoning: thought,
        ..usage(answer, choices)
    };
    answer.head.write("chat.completion", &mut out);
    json::raw(&mut out, "\"choices\":");
    let messages = choices.iter().zip(readers).enumerate();
    json::list(&mut out, messages, |out, (index, (choice, reader))| {
        let message = Message::read(answer, choice, reader);
        message.write(out, answer, model, index, choice, reasoning_field);
    });
    json::raw(
        &mut out,
        ",\"service_tier\":null,\"system_fingerprint\":null,\"usage\":",
    );
    usage.write(&mut out);
    json::raw(&mut out, ",\"prompt_logprobs\":");
    match choices.first() {
        Some(choice) if answer.prompt_logprobs => {
            write_prompt(&mut out, &model.assets.tokenizer, &choice.prompt_logprobs);
        }
        _ => json::raw(&mut out, "null"),
    }
    json::raw(&mut out, ",\"prompt_token_ids\":");
    json::write(
        &mut out,
        &answer.return_token_ids.then_some(&answer.prompt.tokens),
    );
    json::raw(&mut out, ",\"prompt_text\":");
    json::write(
        &mut out,
        &answer
            .prompt
            .text
            .as_ref()
            .filter(|_| answer.return_prompt_text),
    );
    json::raw(&mut out, ",\"kv_transfer_params\":null}");
    let headers = [(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    )];
    (headers, out.freeze()).into_response()
}

/// A choice's message, as it is shown.
struct Message {
    content: Option<String>,
    reasoning: Option<String>,
    calls: Vec<CallDelta>,
    finish: &'static str,
    /// Tokens and log-probabilities are shown.
    metadata: bool,
}

impl Message {
    fn read(answer: &Answer, choice: &Collected, reader: Reader) -> Self {
        let thinks = reader.thought().is_some();
        let metadata = answer.include_reasoning || !reader.has_parser();
        let Parsed {
            mut reasoning,
            content,
            calls,
        } = reader.whole(&choice.text);
        if !answer.include_reasoning {
            reasoning.clear();
        }
        let mut calls = calls;
        let reason = choice
            .finish
            .as_ref()
            .map_or(Reason::Stop, |finish| finish.reason);
        let called = match answer.wish {
            Wish::Auto => !calls.is_empty(),
            Wish::Required => reason == Reason::Stop,
            Wish::Named => false,
        };
        if !answer.parallel_tool_calls {
            calls.truncate(1);
        }
        let mut content = match answer.wish {
            // A message that had to be a call has an empty content, not none.
            Wish::Required | Wish::Named => Some(content),
            Wish::Auto if !calls.is_empty() => Some(content).filter(|text| !text.trim().is_empty()),
            Wish::Auto => Some(content).filter(|content| !thinks || !content.is_empty()),
        };
        if !answer.echo.is_empty() {
            content = Some(answer.echo.clone() + content.as_deref().unwrap_or_default());
        }
        Self {
            content,
            reasoning: Some(reasoning).filter(|reasoning| !reasoning.is_empty()),
            calls,
            finish: if called {
                "tool_calls"
            } else {
                reason.as_str()
            },
            metadata,
        }
    }

    fn write(
        &self,
        out: &mut BytesMut,
        answer: &Answer,
        model: &Model,
        index: usize,
        choice: &Collected,
        reasoning_field: ReasoningField,
    ) {
        json::raw(out, "{\"index\":");
        json::number(out, index);
        json::raw(out, ",\"message\":{\"role\":");
        json::string(out, &answer.role);
        json::raw(out, ",\"content\":");
        json::write(out, &self.content);
        json::raw(
            out,
            ",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null",
        );
        if !self.calls.is_empty() {
            json::raw(out, ",\"tool_calls\":");
            json::list(out, &self.calls, |out, call| {
                stream::write_call(out, call, false);
            });
        }
        json::raw(out, ",\"");
        json::raw(out, reasoning_field.as_str());
        json::raw(out, "\":");
        json::write(out, &self.reasoning);
        json::raw(out, "},\"logprobs\":");
        match answer.logprobs.filter(|_| self.metadata) {
            Some(count) => {
                let mut texts = LogprobTexts::new(model.assets.tokenizer.clone());
                logprobs::write(
                    out,
                    &mut texts,
                    &choice.logprobs,
                    count,
                    answer.tokens_as_ids,
                );
            }
            None => json::raw(out, "null"),
        }
        json::raw(out, ",\"finish_reason\":\"");
        json::raw(out, self.finish);
        json::raw(out, "\",\"stop_reason\":");
        write_stop(
            out,
            choice
                .finish
                .as_ref()
                .and_then(|finish| finish.stop.as_ref()),
        );
        json::raw(out, ",\"token_ids\":");
        json::write(
            out,
            &(answer.return_token_ids && self.metadata).then_some(&choice.tokens),
        );
        json::raw(out, "}");
    }
}

fn usage(answer: &Answer, choices: &[Collected]) -> Usage {
    Usage {
        prompt: answer.prompt.tokens.len(),
        completion: choices.iter().map(|choice| choice.tokens.len()).sum(),
        cached: cached(choices),
        reasoning: None,
    }
}
