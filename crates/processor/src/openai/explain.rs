//! `POST /route/explain`: where a completions or chat request would go, and why, without sending it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::{Extension, Json};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::error::ApiError;
use super::{chat, completions};
use crate::App;
use crate::generate::Choice;
use crate::server::{RequestBody, RequestId};

/// What tells a chat request from one for completions.
#[derive(Deserialize)]
struct Kind {
    messages: Option<IgnoredAny>,
}

/// Explains the way of a request, one entry per prompt.
pub(crate) async fn handle(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    headers: HeaderMap,
    RequestBody(body): RequestBody,
) -> Result<Json<Value>, ApiError> {
    // Bodies that are no objects are refused by whoever reads them for good.
    let kind = serde_json::from_slice(&body).unwrap_or(Kind { messages: None });
    let (model, choices) = match kind.messages {
        Some(IgnoredAny) => chat::unsent(&app, id, headers, body).await?,
        None => completions::unsent(&app, id, headers, body).await?,
    };
    let prompts: Vec<_> = choices.iter().filter_map(Choice::explain).collect();
    Ok(Json(json!({
        "model": model.id,
        "router_mode": app.config.router_mode,
        "prompts": prompts,
    })))
}
