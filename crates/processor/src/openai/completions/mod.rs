//! `POST /v1/completions`: text, texts or tokens in, their continuation out.

mod convert;
mod full;
mod logprobs;
mod stream;
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
use crate::generate::{Choice, Generation, collect, sse};
use crate::metrics::{Endpoint, Observation, Outcome};
use crate::models::Model;
use crate::server::{RequestBody, RequestId};
pub(crate) use full::write_stop;
pub(crate) use types::CompletionRequest;

/// Answers a completion request.
pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    RequestBody(body): RequestBody,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = request::read(body, &app.long_work).await?;
    let model = common::model(&app, request.shared.model.as_deref())?;
    let mut observation = model.metrics.begin(Endpoint::Completions);
    let arrival = Arrival::new(id, headers, &app.config)?;
    let prepared = convert::prepare(request, &model, &arrival, &app.long_work).await;
    let prepared = prepared.inspect_err(|error| observation.end(Outcome::from(error.code())))?;
    let response = answer(prepared, model, observation).await?;
    Ok(arrival.tell(response))
}

/// Returns the first choice of each prompt of a request, which is not sent.
///
/// # Errors
/// Those of [`handle`] up to there.
pub(crate) async fn unsent(
    app: &App,
    id: RequestId,
    headers: HeaderMap,
    body: Bytes,
) -> Result<(Arc<Model>, Vec<Choice>), ApiError> {
    let request: CompletionRequest = request::read(body, &app.long_work).await?;
    let model = common::model(app, request.shared.model.as_deref())?;
    let arrival = Arrival::new(id, headers, &app.config)?;
    let prepared = convert::prepare(request, &model, &arrival, &app.long_work).await?;
    let each = prepared.answer.n.max(1);
    Ok((model, prepared.choices.into_iter().step_by(each).collect()))
}

async fn answer(
    prepared: convert::Prepared,
    model: Arc<Model>,
    mut observation: Observation,
) -> Result<Response, ApiError> {
    let convert::Prepared {
        choices,
        answer,
        stream,
    } = prepared;
    answer
        .prompts
        .iter()
        .for_each(|prompt| observation.prompt(prompt.tokens.len()));
    let generation = Generation::new(choices);
    if let Some(usage) = stream {
        return sse(
            generation,
            stream::Stream::new(answer, model, usage),
            observation,
        )
        .await;
    }
    let collected = collect(generation, &mut observation, |_, _, _| {}).await;
    let collected = collected.inspect_err(|error| observation.end(Outcome::from(error.code())))?;
    observation.end(Outcome::Success);
    full::response(&answer, &model, &collected)
}
