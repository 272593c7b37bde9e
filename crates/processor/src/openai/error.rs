//! What a client is told when its request fails: the OpenAI error body and the HTTP status.
//!
//! The same body travels in a stream's error event. `code` is the HTTP status as a number, as vLLM writes
//! it (0.32, `serve/engine/protocol.py`); `param` names the request field at fault.

use std::borrow::Cow;
use std::fmt;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use stator_common::Code;
use stator_common::proto::worker;

/// Seconds after which a refused client may try again. A full engine frees a slot within seconds, and a
/// worker that was lost comes back or is replaced in about that time.
const RETRY_AFTER_SECONDS: u16 = 1;

/// Why a request failed, as its client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    code: Code,
    message: String,
    param: Option<Cow<'static, str>>,
}

impl ApiError {
    /// Makes an error without a field at fault.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
        }
    }

    /// Makes the error of a field that is missing, malformed or out of range.
    pub fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            code: Code::InvalidRequest,
            message: message.into(),
            param: Some(param.into()),
        }
    }

    /// Makes the error of a model that is not served here.
    pub fn unknown_model(model: &str) -> Self {
        Self {
            code: Code::NotFound,
            message: format!("the model `{model}` does not exist"),
            param: Some("model".into()),
        }
    }

    /// Names the field at fault.
    pub fn with_param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Returns the code, which decides the HTTP status.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Returns the field at fault, where there is one.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// Returns the body: `{"error":{"message","type","param","code"}}`.
    pub fn to_json(&self) -> String {
        json!({"error": {
            "message": self.message,
            "type": self.code.openai_type(),
            "param": self.param,
            "code": self.code.http_status(),
        }})
        .to_string()
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// What a worker said when it refused or broke off an attempt.
impl From<worker::Error> for ApiError {
    fn from(error: worker::Error) -> Self {
        let code = Code::from(error.code());
        let param = (!error.field.is_empty()).then_some(Cow::Owned(error.field));
        Self {
            code,
            message: error.message,
            param,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.http_status())
            .expect("every code has an HTTP status between 100 and 999");
        let mut response = (
            status,
            [(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/json"),
            )],
            self.to_json(),
        )
            .into_response();
        if matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS.into());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_that_may_pass_later_says_when() {
        for (code, waits) in [
            (Code::Overloaded, true),
            (Code::Draining, true),
            (Code::Disconnected, true),
            (Code::InvalidRequest, false),
            (Code::Internal, false),
        ] {
            let response = ApiError::new(code, "x").into_response();
            assert_eq!(
                response.headers().contains_key(header::RETRY_AFTER),
                waits,
                "{code:?}"
            );
            assert_eq!(response.status().as_u16(), code.http_status());
        }
    }

    #[test]
    fn the_body_has_the_four_keys_of_openai() {
        let body = ApiError::invalid("top_p", "top_p must be in (0, 1], got \"2\"").to_json();
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["error"]["param"], "top_p");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["error"]["code"], 400);
        assert_eq!(
            body["error"]["message"],
            "top_p must be in (0, 1], got \"2\""
        );
    }
}
