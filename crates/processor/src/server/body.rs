//! Reads a request's body, no slower and no larger than allowed.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::Body as _;
use http_body_util::BodyExt;
use stator_common::Code;
use tokio::time::{Instant, timeout_at};

use super::routes::refusal;
use crate::App;
use crate::openai::ApiError;

/// Room that is made for a body before its bytes have arrived, whatever its announced length.
const MAX_RESERVED: u64 = 1 << 20;
/// Bytes per second that a body must bring once its first `body_timeout` is over: the slowest of modems did more,
/// and a body is not waited for longer than its bytes are worth.
const MIN_RATE: u64 = 4 << 10;

/// The whole body of a request, read under the configured limits.
///
/// Use it as the last argument of a handler; its errors are the API's own.
pub struct RequestBody(pub Bytes);

impl FromRequest<Arc<App>> for RequestBody {
    type Rejection = Response;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Response> {
        read(request, app)
            .await
            .map(Self)
            .map_err(|refused| match refused {
                Refused::Bad(error) => error.into_response(),
                Refused::TooSlow(message) => refusal(StatusCode::REQUEST_TIMEOUT, &message),
            })
    }
}

/// Why a body was not read.
enum Refused {
    Bad(ApiError),
    TooSlow(String),
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self::Bad(error)
    }
}

async fn read(request: Request, app: &App) -> Result<Bytes, Refused> {
    let limit = app.config.max_body_bytes;
    let mut body = request.into_body();
    let announced = body.size_hint().lower();
    if announced > limit as u64 {
        return Err(too_large(limit).into());
    }
    let pause = app.config.body_timeout;
    let begun = Instant::now();
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    while !body.is_end_stream() {
        let so_far = first.as_ref().map_or(0, Bytes::len) + all.len();
        let due = begun + pause + Duration::from_secs(so_far as u64 / MIN_RATE);
        let Ok(frame) = timeout_at(due.min(Instant::now() + pause), body.frame()).await else {
            let message = if Instant::now() < due {
                let pause = humantime::format_duration(pause);
                format!("no part of the body came for {pause}")
            } else {
                format!("the body comes slower than {MIN_RATE} bytes per second")
            };
            return Err(Refused::TooSlow(message));
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|error| {
            ApiError::new(Code::InvalidRequest, format!("the body broke off: {error}"))
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if so_far + data.len() > limit {
            return Err(too_large(limit).into());
        }
        match first.take() {
            // Most bodies come in one piece, which is used as it is.
            None if all.is_empty() => first = Some(data),
            None => all.extend_from_slice(&data),
            Some(piece) => {
                let room = announced.min(MAX_RESERVED) as usize;
                all.reserve(room.max(piece.len() + data.len()));
                all.extend_from_slice(&piece);
                all.extend_from_slice(&data);
            }
        }
    }
    Ok(first.unwrap_or_else(|| all.freeze()))
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        Code::TooLarge,
        format!("the body is larger than {limit} bytes"),
    )
}
