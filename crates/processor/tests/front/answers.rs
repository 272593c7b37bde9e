//! What the workers of these tests do with every request, and the request that they are sent.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use stator_common::Code;
use stator_common::plane::delta;
use stator_common::proto::worker::FinishReason;
use stator_testkit::http::post;
use stator_testkit::worker::{Attempt, Script};

/// Answers with these tokens and the end.
pub(crate) fn tokens(tokens: &[u32]) -> impl Script + use<> {
    let tokens = tokens.to_vec();
    move |attempt: Attempt| attempt.finish(&tokens, FinishReason::Length)
}

/// Refuses everything.
pub(crate) fn refuses(code: Code) -> impl Script {
    move |attempt: Attempt| attempt.send(delta::failed(0, code, "refused by the test"))
}

/// Says nothing.
pub(crate) fn silent() -> impl Script {
    |_: Attempt| {}
}

/// A completion of one token, its prompt given as tokens.
pub(crate) fn completion() -> Request<Full<Bytes>> {
    post(
        "/v1/completions",
        r#"{"model": "model", "prompt": [1, 2], "max_tokens": 1}"#,
    )
}
