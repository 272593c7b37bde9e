//! Between the messages of the plane and the engine's own types. No decisions are made here: what a
//! request may ask is the engine client's to judge.

use stator_common::{Code, plane::delta, proto::worker as proto};
use stator_engine::{
    Constraint, Finish, Logprobs, Lora, Output, Request, RequestError, Sampling, StructuredOutputs,
    SubmitError, Tokens,
};

/// Why a message is no request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("prompt_tokens: {0} bytes are no sequence of 32-bit token ids")]
    Prompt(usize),
    #[error("sampling is missing")]
    NoSampling,
    #[error("structured_outputs holds no constraint")]
    NoConstraint,
}

impl Malformed {
    /// Returns the wire form.
    pub(crate) fn to_error(&self) -> proto::Error {
        let (code, field) = match self {
            Self::Prompt(_) => (Code::InvalidRequest, "prompt_tokens"),
            Self::NoSampling => (Code::InvalidRequest, "sampling"),
            Self::NoConstraint => (Code::InvalidRequest, "structured_outputs"),
        };
        error(code, self.to_string(), field)
    }
}

/// Returns the wire form of an engine's refusal.
pub(crate) fn refusal(refused: &SubmitError) -> proto::Error {
    match refused {
        SubmitError::Invalid(invalid) => {
            error(Code::InvalidRequest, invalid.message.clone(), invalid.field)
        }
        SubmitError::Unsent(_) | SubmitError::Dead => {
            error(Code::EngineDead, refused.to_string(), "")
        }
    }
}

pub(crate) fn error(code: Code, message: impl Into<String>, field: &str) -> proto::Error {
    proto::Error {
        code: proto::Code::from(code).into(),
        message: message.into(),
        field: field.to_owned(),
        untouched: false,
    }
}

/// Takes a request apart for the engine.
///
/// - `lora`: the adapter that it names.
pub(crate) fn request(
    message: proto::GenerateRequest,
    lora: Option<Lora>,
) -> Result<Request, Malformed> {
    let bytes = message.prompt_tokens.len();
    let prompt = Tokens::from_le_bytes(message.prompt_tokens).ok_or(Malformed::Prompt(bytes))?;
    let sampling = message.sampling.ok_or(Malformed::NoSampling)?;
    Ok(Request {
        id: message.request_id,
        prompt,
        sampling: self::sampling(sampling)?,
        cache_salt: filled(message.cache_salt),
        priority: message.priority,
        // Each rank is an engine of its own, which knows of no other.
        dp_rank: None,
        lora,
        kv_transfer_params: (!message.kv_transfer_params.is_empty())
            .then_some(message.kv_transfer_params),
        trace_headers: message.trace_headers.into_iter().collect(),
        reasoning_ended: message.reasoning_ended,
        abort_immediately: false,
    })
}

fn sampling(message: proto::Sampling) -> Result<Sampling, Malformed> {
    Ok(Sampling {
        temperature: message.temperature,
        top_p: message.top_p,
        top_k: message.top_k,
        min_p: message.min_p,
        seed: message.seed,
        presence_penalty: message.presence_penalty,
        frequency_penalty: message.frequency_penalty,
        repetition_penalty: message.repetition_penalty,
        max_tokens: message.max_tokens,
        min_tokens: message.min_tokens,
        stop_token_ids: message.stop_token_ids,
        ignore_eos: message.ignore_eos,
        logprobs: message.logprobs,
        prompt_logprobs: message.prompt_logprobs,
        logit_bias: message.logit_bias.into_iter().collect(),
        allowed_token_ids: message.allowed_token_ids,
        bad_words: message
            .bad_words
            .into_iter()
            .map(|list| list.tokens)
            .collect(),
        structured_outputs: message.structured_outputs.map(structured).transpose()?,
        eos_token_id: message.eos_token_id,
        all_stop_token_ids: message.all_stop_token_ids,
        extra_args: filled(message.extra_args_json),
        skip_reading_prefix_cache: message.skip_reading_prefix_cache,
        thinking_token_budget: message.thinking_token_budget,
    })
}

fn structured(message: proto::StructuredOutputs) -> Result<StructuredOutputs, Malformed> {
    use proto::structured_outputs::Constraint as Wire;
    let constraint = match message.constraint.ok_or(Malformed::NoConstraint)? {
        Wire::Json(schema) => Constraint::Json(schema),
        Wire::Regex(regex) => Constraint::Regex(regex),
        Wire::Choice(list) => Constraint::Choice(list.values),
        Wire::Grammar(grammar) => Constraint::Grammar(grammar),
        Wire::JsonObject(true) => Constraint::JsonObject,
        Wire::JsonObject(false) => return Err(Malformed::NoConstraint),
        Wire::StructuralTag(tag) => Constraint::StructuralTag(tag),
    };
    Ok(StructuredOutputs {
        constraint,
        disable_any_whitespace: message.disable_any_whitespace,
        disable_additional_properties: message.disable_additional_properties,
        whitespace_pattern: filled(message.whitespace_pattern),
    })
}

fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Returns what one step added to one stream.
pub(crate) fn delta(stream: u32, output: Output) -> proto::Delta {
    let error = match (output.finish, output.error) {
        (Some(Finish::Error), cause) => Some(failure(cause.as_deref())),
        // What we abort has no more outputs, so this is the engine's own: it is being stopped.
        (Some(Finish::Abort), _) => Some(error(
            Code::EngineDead,
            "the engine gave up this request, as it does when it is stopped",
            "",
        )),
        _ => None,
    };
    proto::Delta {
        stream,
        tokens: output.tokens.to_vec(),
        logprobs: output.logprobs.as_deref().map(logprobs).unwrap_or_default(),
        prompt_logprobs: output
            .prompt_logprobs
            .as_deref()
            .map(logprobs)
            .unwrap_or_default(),
        finish: output
            .finish
            .map_or(proto::FinishReason::Unspecified, finish)
            .into(),
        stop_token_id: output.stop_token,
        cached_tokens: output.cached_tokens,
        kv_transfer_params: output.kv_transfer_params.unwrap_or_default(),
        kv_lease_ms: None,
        error,
    }
}

/// Returns the last delta of a stream that was refused or broke off.
pub(crate) fn failed(stream: u32, error: proto::Error) -> proto::Delta {
    proto::Delta {
        error: Some(error),
        ..delta::failed(stream, Code::Internal, "")
    }
}

fn finish(finish: Finish) -> proto::FinishReason {
    match finish {
        Finish::Stop => proto::FinishReason::Stop,
        Finish::Length => proto::FinishReason::Length,
        Finish::Abort | Finish::Error => proto::FinishReason::Error,
        Finish::Repetition => proto::FinishReason::Repetition,
    }
}

fn failure(cause: Option<&RequestError>) -> proto::Error {
    match cause {
        Some(cause) if cause.code == RequestError::GRAMMAR => error(
            Code::InvalidRequest,
            cause.message.clone(),
            "structured_outputs",
        ),
        // The engine client's own words for a lost engine, and vLLM's for a paused one.
        Some(cause) => {
            let code = match cause.code.as_str() {
                "engine_dead" | "connection_lost" | "unreadable_output" => Code::EngineDead,
                _ if cause.retryable => Code::Unavailable,
                _ => Code::Internal,
            };
            error(code, cause.message.clone(), "")
        }
        None => error(
            Code::Internal,
            "the engine failed this request; its log says why",
            "",
        ),
    }
}

fn logprobs(rows: &Logprobs) -> Vec<proto::TokenLogprobs> {
    rows.iter()
        .map(|(tokens, logprobs, rank)| proto::TokenLogprobs {
            tokens: tokens.to_vec(),
            logprobs: logprobs.to_vec(),
            rank,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output {
            key: stator_engine::RequestKey(1),
            tokens: [5_u32, 6][..].into(),
            logprobs: Some(Box::new(Logprobs {
                width: 2,
                tokens: vec![5, 9, 6, 8],
                values: vec![-0.1, -2.0, -0.2, -3.0],
                ranks: vec![1, 2],
            })),
            prompt_logprobs: None,
            finish: None,
            stop_token: None,
            cached_tokens: Some(32),
            kv_transfer_params: None,
            error: None,
        }
    }

    #[test]
    fn every_token_keeps_its_log_probabilities() {
        let delta = delta(7, output());
        assert_eq!((delta.stream, &delta.tokens[..]), (7, &[5, 6][..]));
        assert_eq!(delta.logprobs[1].tokens, [6, 8]);
        assert_eq!(delta.logprobs[1].rank, 2);
        assert_eq!(delta.cached_tokens, Some(32));
        assert_eq!(delta.finish(), proto::FinishReason::Unspecified);
        assert!(delta.error.is_none());
    }

    #[test]
    fn an_error_is_there_exactly_with_its_finish_reason() {
        let failed = delta(
            1,
            Output {
                finish: Some(Finish::Error),
                ..output()
            },
        );
        assert_eq!(failed.error.unwrap().code(), proto::Code::Internal);
        let dead = RequestError {
            code: "engine_dead".to_owned(),
            message: "gone".to_owned(),
            retryable: true,
        };
        assert_eq!(failure(Some(&dead)).code(), proto::Code::EngineDead);
    }

    #[test]
    fn a_request_that_the_engine_gave_up_may_be_tried_elsewhere() {
        let aborted = delta(
            1,
            Output {
                finish: Some(Finish::Abort),
                ..output()
            },
        );
        assert_eq!(aborted.finish(), proto::FinishReason::Error);
        let code = Code::from(aborted.error.unwrap().code());
        assert!(code.is_retryable());
    }

    #[test]
    fn a_prompt_that_is_no_sequence_of_tokens_is_refused() {
        let message = proto::GenerateRequest {
            prompt_tokens: vec![1, 2, 3].into(),
            ..Default::default()
        };
        assert_eq!(request(message, None).unwrap_err(), Malformed::Prompt(3));
    }
}
