//! Whose fault it is that a constrained request fails before its first token: the request's only where the
//! worker says so.

use serde_json::{Value, json};
use stator_common::Code;
use stator_common::plane::delta::failed;
use stator_common::proto::worker::{Delta, Error};

use crate::stage::Stage;

const CHAT: &str = "/v1/chat/completions";

/// A request whose constraint comes from a field, and that field.
fn constrained() -> [(Value, &'static str); 3] {
    let with = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        let fields = fields.as_object().cloned().unwrap_or_default();
        body.as_object_mut().expect("an object").extend(fields);
        body
    };
    let tool = json!({"type": "function", "function": {"name": "f"}});
    [
        (
            with(json!({"structured_outputs": {"regex": "[a-"}})),
            "structured_outputs",
        ),
        (
            with(json!({"response_format": {"type": "json_object"}})),
            "response_format",
        ),
        (
            with(json!({"tools": [tool], "tool_choice": "required",
                "response_format": {"type": "json_object"}})),
            "tools",
        ),
    ]
}

#[tokio::test]
async fn a_constraint_that_the_worker_blames_is_named_as_the_request_names_it() {
    for (body, field) in constrained() {
        let mut stage = Stage::new().await;
        let answer = stage.ask(CHAT, &body);
        let attempt = stage.attempt().await;
        let error = Error {
            code: stator_common::proto::worker::Code::InvalidRequest.into(),
            message: "it does not compile".to_owned(),
            field: "structured_outputs".to_owned(),
            ..Default::default()
        };
        attempt.send(Delta {
            error: Some(error),
            ..failed(0, Code::InvalidRequest, "")
        });
        let answered = answer.await.expect("an answer");
        assert_eq!(answered.status, 400, "{answered:?}");
        assert_eq!(answered.json()["error"]["param"], field);
    }
}

#[tokio::test]
async fn a_fault_that_nobody_explains_is_not_the_requests() {
    for (body, _) in constrained() {
        for (code, status) in [(Code::Internal, 500), (Code::DeadlineExceeded, 504)] {
            let mut stage = Stage::new().await;
            let answer = stage.ask(CHAT, &body);
            let attempt = stage.attempt().await;
            attempt.send(failed(0, code, "its log says why"));
            let answered = answer.await.expect("an answer");
            assert_eq!(answered.status, status, "{answered:?}");
            assert_eq!(answered.json()["error"]["param"], Value::Null);
        }
    }
}
