//! Is it there, and can it answer?

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};
use stator_common::drain::Phase;

use crate::App;

/// `GET /live`: the process runs.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /health`: 200 while some model answers, else 503 with the reasons.
pub(super) async fn health(State(app): State<Arc<App>>) -> (StatusCode, Json<Value>) {
    let models = app.models.list();
    let (up, down): (Vec<_>, Vec<_>) = models.iter().partition(|model| model.pool.is_available());
    let mut reasons: Vec<String> = down
        .iter()
        .map(|model| format!("{}: no worker is connected", model.id))
        .chain(app.models.unused().into_iter().map(|unused| {
            format!(
                "{}: worker {} is not used: {}",
                unused.model, unused.worker, unused.reason
            )
        }))
        .collect();
    let status = if app.drain.phase() != Phase::Running {
        reasons.push("the process is being ended".to_owned());
        "draining"
    } else if !up.is_empty() {
        "ready"
    } else {
        if reasons.is_empty() {
            reasons.push("no worker was found".to_owned());
        }
        "unavailable"
    };
    let code = if status == "ready" {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let up: Vec<_> = up.iter().map(|model| &model.id).collect();
    (
        code,
        Json(json!({"status": status, "models": up, "reasons": reasons})),
    )
}
