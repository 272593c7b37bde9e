//! `GET /openapi.json`.

use axum::response::{IntoResponse, Response};
use http::header;

/// Returns the description of the API.
pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], "{}").into_response()
}
