//! The OpenAI API: what requests may say and what answers look like.
//!
//! A folder per endpoint (`chat`, `completions`): the request's `types`, its `convert`-ion to what an engine takes,
//! and the answer, `full` or as a `stream`. What both have in common lies beside them. Answers equal those
//! of `vllm serve` 0.32 in names and values; where OpenAI and vLLM disagree, vLLM is followed.

pub(crate) mod chat;
pub(crate) mod common;
mod completions;
mod error;
mod explain;
pub(crate) mod json;
mod logprobs;
pub(crate) mod prompt;
pub(crate) mod request;
pub(crate) mod route;
mod sampling;
mod structured;
mod usage;

use std::sync::Arc;

use axum::Router;
use axum::routing::post;

use crate::App;

pub use error::ApiError;

/// Returns the routes of the generating endpoints and of the tokenizer.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/route/explain", post(explain::handle))
        .merge(crate::tokenize::routes())
}

/// Returns the fields that generating requests have, by the name of their schema in `openapi.json`.
#[cfg(test)]
pub(crate) fn request_fields() -> [(&'static str, &'static [&'static str]); 3] {
    [
        ("GenerationFields", request::Shared::NAMES),
        ("ChatCompletionRequest", chat::types::ChatFields::NAMES),
        (
            "CompletionRequest",
            completions::types::CompletionFields::NAMES,
        ),
    ]
}
