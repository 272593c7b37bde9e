//! Chat completions that succeed.

mod answers;
mod logprobs;
mod stop;
mod streams;
mod tools;

use serde_json::{Value, json};
use stator_common::proto::worker::structured_outputs::Constraint;
use stator_common::proto::worker::{Delta, FinishReason};
use stator_testkit::model::{OTHER_END, tokens};
use stator_testkit::worker::Attempt;

use crate::stage::{Stage, position};

const CHAT: &str = "/v1/chat/completions";

fn hi(fields: &Value) -> Value {
    let mut body = json!({"model": "model", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in fields.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

/// Returns the text of a choice's events, in the order in which they came.
fn streamed(events: &[Value], index: usize) -> String {
    let choices = events
        .iter()
        .flat_map(|event| event["choices"].as_array().into_iter().flatten());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["delta"]["content"].as_str())
        .collect()
}
