//! Reads a request's body, no longer and no larger than allowed.

use std::sync::Arc;

use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt;
use stator_common::Code;
use tokio::time::timeout;

use crate::App;
use crate::openai::ApiError;

/// Room that is made for a body before its bytes have arrived, whatever its announced length.
const MAX_RESERVED: u64 = 1 << 20;

/// The whole body of a request, read under the configured limits.
///
/// Use it as the last argument of a handler; its errors are the API's own.
pub struct RequestBody(pub Bytes);

impl FromRequest<Arc<App>> for RequestBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = app.config.max_body_bytes;
        let mut body = request.into_body();
        let announced = body.size_hint().lower();
        if announced > limit as u64 {
            return Err(too_large(limit));
        }
        let mut first: Option<Bytes> = None;
        let mut all = BytesMut::new();
        while !body.is_end_stream() {
            let Ok(frame) = timeout(app.config.body_timeout, body.frame()).await else {
                let pause = humantime::format_duration(app.config.body_timeout);
                let message = format!("no part of the body came for {pause}");
                return Err(ApiError::new(Code::DeadlineExceeded, message));
            };
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| {
                ApiError::new(Code::InvalidRequest, format!("the body broke off: {error}"))
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            let so_far = first.as_ref().map_or(0, Bytes::len) + all.len();
            if so_far + data.len() > limit {
                return Err(too_large(limit));
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
        Ok(Self(first.unwrap_or_else(|| all.freeze())))
    }
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        Code::TooLarge,
        format!("the body is larger than {limit} bytes"),
    )
}
