//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::App;
use crate::models::Model;
use crate::openai::ApiError;

/// Lists every model under each of its names.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models = app.models.list();
    let entries = models
        .iter()
        .flat_map(|model| model.card.names.iter().map(|name| entry(name, model)));
    Json(json!({"object": "list", "data": entries.collect::<Vec<_>>()}))
}

/// Describes one model; its name may contain slashes.
pub(super) async fn one(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    match app.models.find(&name) {
        Ok(model) => Ok(Json(entry(&name, &model))),
        Err(error) => Err(ApiError::new(error.code(), error.to_string()).with_param("model")),
    }
}

/// Describes a model as OpenAI does, with vLLM's additions `root`, `parent` and `max_model_len`.
fn entry(name: &str, model: &Model) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "stator",
        "root": model.card.root,
        "parent": (name != model.id).then_some(&model.id),
        "max_model_len": model.card.max_model_len,
    })
}
