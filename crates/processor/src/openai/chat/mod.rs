//! `POST /v1/chat/completions`: a conversation in, its next message out.

mod convert;
mod full;
mod listed;
mod logprobs;
mod reader;
mod render;
mod stream;
mod structural;
mod tools;
pub(crate) mod types;

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;

use super::common::{self, Arrival};
use super::error::ApiError;
use super::request;
use crate::App;
use crate::config::ReasoningField;
use crate::generate::{Choice, Generation, collect, sse};
use crate::metrics::{Endpoint, Observation, Outcome};
use crate::models::Model;
use crate::server::{RequestBody, RequestId};
use reader::Reader;
use types::ChatRequest;

pub(crate) use render::{Rendering, render};

/// Answers a chat completion request.
pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    RequestBody(body): RequestBody,
) -> Result<Response, ApiError> {
    let bytes = body.len();
    let request: ChatRequest = request::read(body, &app.long_work).await?;
    let model = common::model(&app, request.shared.model.as_deref())?;
    let mut observation = model.metrics.begin(Endpoint::Chat);
    let arrival = Arrival::new(id, headers, &app.config)?;
    let prepared = convert::prepare(request, bytes, &model, &arrival, &app).await;
    let prepared = prepared.inspect_err(|error| observation.end(Outcome::from(error.code())))?;
    let reasoning_field = app.config.reasoning_field_name;
    let response = answer(prepared, model, reasoning_field, observation).await?;
    Ok(arrival.tell(response))
}

/// Returns the first choice of a request, which is not sent.
///
/// # Errors
/// Those of [`handle`] up to there.
pub(crate) async fn unsent(
    app: &App,
    id: RequestId,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(Arc<Model>, Vec<Choice>), ApiError> {
    let bytes = body.len();
    let request: ChatRequest = request::read(body, &app.long_work).await?;
    let model = common::model(app, request.shared.model.as_deref())?;
    let arrival = Arrival::new(id, headers, &app.config)?;
    let mut prepared = convert::prepare(request, bytes, &model, &arrival, app).await?;
    prepared.choices.truncate(1);
    Ok((model, prepared.choices))
}

async fn answer(
    prepared: convert::Prepared,
    model: Arc<Model>,
    reasoning_field: ReasoningField,
    mut observation: Observation,
) -> Result<Response, ApiError> {
    let convert::Prepared {
        choices,
        readers,
        mut counters,
        answer,
        stream,
    } = prepared;
    observation.prompt(answer.prompt.tokens.len());
    let generation = Generation::new(choices);
    if let Some(usage) = stream {
        let stream = stream::Stream::new(answer, &model, usage, readers, reasoning_field);
        return sse(generation, stream, observation).await;
    }
    let collected = collect(generation, &mut observation, |index, text, piece| {
        if let Some(counter) = counters.get_mut(index) {
            counter.push(text, &piece.tokens, false);
        }
    });
    let collected = collected.await;
    let collected = collected.inspect_err(|error| observation.end(Outcome::from(error.code())))?;
    observation.end(Outcome::Success);
    let thought = counters
        .iter()
        .filter_map(Reader::thought)
        .reduce(|a, b| a + b);
    let read = full::Read {
        choices: &collected,
        readers,
        thought,
    };
    Ok(full::response(&answer, &model, read, reasoning_field))
}
