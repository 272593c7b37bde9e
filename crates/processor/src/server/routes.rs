//! Which handler answers which path, and what a path counts as.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{Method, StatusCode, Uri, header};
use metrics::Counter;
use parking_lot::RwLock;
use serde_json::json;
use stator_common::Code;

use super::{health, models, openapi, scrape, workers};
use crate::App;
use crate::metrics::Metrics;
use crate::openai::{self, ApiError};

/// A route as access rules and counters know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Route {
    Chat,
    Completions,
    Explain,
    Tokenize,
    Detokenize,
    Models,
    Model,
    Health,
    Live,
    Metrics,
    Workers,
    Version,
    OpenApi,
    /// Everything that is not served.
    Other,
}

impl Route {
    /// Every route that is served.
    #[cfg(test)]
    pub(super) const ALL: [Self; 13] = [
        Self::Chat,
        Self::Completions,
        Self::Explain,
        Self::Tokenize,
        Self::Detokenize,
        Self::Models,
        Self::Model,
        Self::Health,
        Self::Live,
        Self::Metrics,
        Self::Workers,
        Self::Version,
        Self::OpenApi,
    ];

    /// Returns the route of a path.
    pub(super) fn of(path: &str) -> Self {
        match path {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completions,
            "/route/explain" => Self::Explain,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            "/v1/models" => Self::Models,
            "/health" => Self::Health,
            "/live" => Self::Live,
            "/metrics" => Self::Metrics,
            "/workers" => Self::Workers,
            "/version" => Self::Version,
            "/openapi.json" => Self::OpenApi,
            path if path.starts_with("/v1/models/") => Self::Model,
            _ => Self::Other,
        }
    }

    pub(super) fn pattern(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Explain => "/route/explain",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::Models => "/v1/models",
            Self::Model => "/v1/models/{model}",
            Self::Health => "/health",
            Self::Live => "/live",
            Self::Metrics => "/metrics",
            Self::Workers => "/workers",
            Self::Version => "/version",
            Self::OpenApi => "/openapi.json",
            Self::Other => "other",
        }
    }

    /// Says whether a route never asks for a key: probes have none.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Health | Self::Live)
    }

    /// Says whether a route tells operators about the inside.
    pub(super) fn is_for_operators(self) -> bool {
        matches!(self, Self::Metrics | Self::Workers)
    }
}

/// Counts answers by route and status.
pub(crate) struct HttpCounters {
    metrics: Arc<Metrics>,
    /// Bounded by the routes times the statuses that they give.
    counters: RwLock<HashMap<(Route, u16), Counter>>,
}

impl HttpCounters {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            counters: RwLock::default(),
        }
    }

    pub(super) fn count(&self, route: Route, status: StatusCode) {
        let key = (route, status.as_u16());
        if let Some(counter) = self.counters.read().get(&key) {
            counter.increment(1);
            return;
        }
        let counter = self.metrics.http_requests(route.pattern(), key.1);
        counter.increment(1);
        self.counters.write().insert(key, counter);
    }
}

/// Returns the router of everything that is served.
pub(super) fn router(app: Arc<App>) -> Router {
    Router::new()
        .merge(openai::routes())
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::one))
        .route("/health", get(health::health))
        .route("/live", get(health::live))
        .route("/version", get(health::version))
        .route("/metrics", get(scrape::metrics))
        .route("/workers", get(workers::workers))
        .route("/openapi.json", get(openapi::document))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app)
}

async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        Code::NotFound,
        format!("{method} {} does not exist", uri.path()),
    )
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message = format!("{method} is not allowed at {}", uri.path());
    refusal(StatusCode::METHOD_NOT_ALLOWED, &message)
}

/// Returns an answer in OpenAI's form with a status of HTTP's own, which no [`Code`] has.
pub(super) fn refusal(status: StatusCode, message: &str) -> Response {
    let body = json!({"error": {
        "message": message,
        "type": Code::InvalidRequest.openai_type(),
        "param": null,
        "code": status.as_u16(),
    }});
    (
        status,
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
        .into_response()
}
