//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::App;
use crate::models::Model;
use crate::openai::ApiError;

/// Lists every model under each of its names, and the adapters after them.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models = app.models.list();
    let entries = models
        .iter()
        .flat_map(|model| model.card.names.iter().map(|name| entry(name, model)));
    let adapters = app.models.adapters();
    let entries = entries.chain(adapters.iter().map(|model| entry(&model.id, model)));
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

/// Describes a model as OpenAI does, with vLLM's additions `root`, `parent` and `max_model_len`. Of an adapter, as of a
/// model, `root` is where its files are.
fn entry(name: &str, model: &Model) -> Value {
    let (root, parent) = match &model.adapter {
        Some(adapter) => (&adapter.root, Some(&adapter.parent)),
        None => (&model.card.root, (name != model.id).then_some(&model.id)),
    };
    json!({
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "stator",
        "root": root,
        "parent": parent,
        "max_model_len": model.card.max_model_len,
    })
}
