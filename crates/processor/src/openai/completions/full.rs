//! A completion's answer in one piece.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use stator_text::LogprobTexts;

use super::convert::{Answer, Echo};
use super::logprobs::{Lists, Show};
use crate::generate::{Collected, Stop, cached};
use crate::models::Model;
use crate::openai::error::ApiError;
use crate::openai::usage::Usage;
use crate::openai::{json, logprobs};

/// Writes the answer.
///
/// - `choices`: all of them, finished.
///
/// # Errors
/// The prompt's tokens cannot be decoded.
pub(super) fn response(
    answer: &Answer,
    model: &Model,
    choices: &[Collected],
) -> Result<Response, ApiError> {
    let mut out = BytesMut::with_capacity(1024);
    answer.head.write("text_completion", &mut out);
    json::raw(&mut out, "\"choices\":[");
    for (index, choice) in choices.iter().enumerate() {
        if index > 0 {
            json::raw(&mut out, ",");
        }
        write_choice(&mut out, answer, model, index, choice)?;
    }
    json::raw(
        &mut out,
        "],\"service_tier\":null,\"system_fingerprint\":null,\"usage\":",
    );
    usage(answer, choices).write(&mut out);
    json::raw(&mut out, ",\"kv_transfer_params\":null}");
    let headers = [(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    )];
    Ok((headers, out.freeze()).into_response())
}

fn write_choice(
    out: &mut BytesMut,
    answer: &Answer,
    model: &Model,
    index: usize,
    choice: &Collected,
) -> Result<(), ApiError> {
    let (_, prompt) = answer.prompt(index);
    let finish = choice.finish.as_ref();
    json::raw(out, "{\"index\":");
    json::number(out, index);
    json::raw(out, ",\"text\":");
    let text = match answer.echo {
        Echo::No => None,
        Echo::Before => Some(answer.echoed(prompt, model)? + &choice.text),
        Echo::Only => Some(answer.echoed(prompt, model)?),
    };
    json::string(out, text.as_deref().unwrap_or(&choice.text));
    json::raw(out, ",\"logprobs\":");
    match answer.logprobs {
        Some(count) => {
            let show = Show {
                count,
                tokens_as_ids: answer.tokens_as_ids,
            };
            lists(answer, model, index, choice, show).write(out);
        }
        None => json::raw(out, "null"),
    }
    json::raw(out, ",\"finish_reason\":");
    json::write(out, &finish.map(|finish| finish.reason.as_str()));
    json::raw(out, ",\"stop_reason\":");
    write_stop(out, finish.and_then(|finish| finish.stop.as_ref()));
    json::raw(out, ",\"token_ids\":");
    json::write(out, &answer.return_token_ids.then_some(&choice.tokens));
    json::raw(out, ",\"prompt_logprobs\":");
    if answer.prompt_logprobs {
        logprobs::write_prompt(out, &model.assets.tokenizer, &choice.prompt_logprobs);
    } else {
        json::raw(out, "null");
    }
    json::raw(out, ",\"prompt_token_ids\":");
    json::write(out, &answer.return_token_ids.then_some(&prompt.tokens));
    json::raw(out, "}");
    Ok(())
}

fn lists(answer: &Answer, model: &Model, index: usize, choice: &Collected, show: Show) -> Lists {
    let tokenizer = &model.assets.tokenizer;
    let mut lists = Lists::default();
    if answer.echo != Echo::No {
        let (_, prompt) = answer.prompt(index);
        lists.push_unknown(tokenizer, prompt.tokens[0], show);
        lists.extend(
            &mut LogprobTexts::new(tokenizer.clone()),
            &choice.prompt_logprobs,
            show,
        );
    }
    if answer.echo != Echo::Only {
        lists.extend(
            &mut LogprobTexts::new(tokenizer.clone()),
            &choice.logprobs,
            show,
        );
    }
    lists
}

/// Writes what stopped a choice, or `null`.
pub(crate) fn write_stop(out: &mut BytesMut, stop: Option<&Stop>) {
    match stop {
        Some(Stop::Token(token)) => json::number(out, *token),
        Some(Stop::Text(text)) => json::string(out, text),
        None => json::raw(out, "null"),
    }
}

fn usage(answer: &Answer, choices: &[Collected]) -> Usage {
    // vLLM counts one prompt of a list only; the sum is what belongs to the sum of their tokens.
    let cached = choices.chunks(answer.n).filter_map(cached);
    Usage {
        prompt: answer
            .prompts
            .iter()
            .map(|prompt| prompt.tokens.len())
            .sum(),
        completion: choices.iter().map(|choice| choice.tokens.len()).sum(),
        cached: cached.reduce(|a, b| a + b),
        reasoning: None,
    }
}
