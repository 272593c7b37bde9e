//! Is it there, and can it answer?

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};
use stator_common::drain::Phase;

use crate::App;
use crate::models::Model;

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
    let up: Vec<_> = models
        .iter()
        .filter(|model| model.fleet.is_available())
        .map(|model| &model.id)
        .collect();
    let reasons = reasons(&app, &models);
    let status = match app.drain.phase() {
        Phase::Draining | Phase::Aborting => "draining",
        Phase::Running if up.is_empty() => "unavailable",
        Phase::Running => "ready",
    };
    let code = if status == "ready" {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        code,
        Json(json!({"status": status, "models": up, "reasons": reasons})),
    )
}

/// Returns what keeps models from answering.
pub(super) fn reasons(app: &App, models: &[Arc<Model>]) -> Vec<String> {
    let down = models.iter().filter_map(|model| {
        let lacks = model.fleet.lacks()?;
        Some(format!("{}: {lacks}", model.id))
    });
    let unused = app.models.unused().into_iter().map(|unused| {
        format!(
            "{}: worker {} is not used: {}",
            unused.model, unused.worker, unused.reason
        )
    });
    let mut reasons: Vec<String> = down.chain(unused).collect();
    if app.drain.phase() != Phase::Running {
        reasons.push("the process is being ended".to_owned());
    }
    if models.is_empty() && reasons.is_empty() {
        reasons.push("no worker was found".to_owned());
    }
    reasons
}
