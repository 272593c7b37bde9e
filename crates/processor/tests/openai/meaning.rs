//! Thoughts and tool calls, told from the text by the model's parsers.

use serde_json::{Value, json};
use stator_processor::config::{Config, ReasoningField};

use crate::stage::Stage;

const CHAT: &str = "/v1/chat/completions";

fn question(fields: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in fields.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

async fn thinker(config: Config) -> Stage {
    Stage::customized(config, |model| {
        model.reasoning_parser = Some("qwen3".to_owned());
    })
    .await
}

fn joined(events: &[Value], field: &str) -> String {
    let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
    deltas.filter_map(|delta| delta[field].as_str()).collect()
}

#[tokio::test]
async fn thoughts_are_told_apart_from_the_answer() {
    for field in [ReasoningField::ReasoningContent, ReasoningField::Reasoning] {
        for stream in [false, true] {
            let mut stage = thinker(Config {
                reasoning_field_name: field,
                ..Config::default()
            })
            .await;
            let options = json!({"stream": stream});
            let answer = stage.ask(CHAT, &question(&options));
            let attempt = stage.attempt().await;
            for piece in ["<think>So", "me thought</th", "ink>The", " answer"] {
                attempt.say(piece);
            }
            attempt.end();
            let answered = answer.await.unwrap();
            let (thought, content) = if stream {
                let events = answered.events();
                (joined(&events, field.as_str()), joined(&events, "content"))
            } else {
                let body = answered.json();
                let message = &body["choices"][0]["message"];
                assert!(body["usage"]["completion_tokens_details"]["reasoning_tokens"].is_u64());
                let text = |name: &str| message[name].as_str().unwrap().to_owned();
                (text(field.as_str()), text("content"))
            };
            assert_eq!(
                (thought.as_str(), content.as_str()),
                ("Some thought", "The answer")
            );
        }
    }
}

#[tokio::test]
async fn hidden_thoughts_leave_no_trace() {
    for stream in [false, true] {
        let mut stage = thinker(Config::default()).await;
        let options =
            json!({"stream": stream, "include_reasoning": false, "return_token_ids": true});
        let answer = stage.ask(CHAT, &question(&options));
        let attempt = stage.attempt().await;
        attempt.say("<think>secret</think>open");
        attempt.end();
        let answered = answer.await.unwrap();
        assert!(answered.text().contains("open"));
        assert!(!answered.text().contains("secret"), "{}", answered.text());
        assert!(
            !answered.text().contains("\"token_ids\":["),
            "{}",
            answered.text()
        );
    }
}

async fn caller() -> Stage {
    Stage::customized(Config::default(), |model| {
        model.tool_call_parser = Some("hermes".to_owned());
    })
    .await
}

fn with_tools(fields: &Value) -> Value {
    let mut body = question(fields);
    body["tools"] = json!([{"type": "function", "function": {"name": "add",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}]);
    body
}

const CALL: &str = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1}}\n</tool_call>";

#[tokio::test]
async fn a_call_in_the_text_becomes_a_tool_call() {
    for stream in [false, true] {
        let mut stage = caller().await;
        let answer = stage.ask(CHAT, &with_tools(&json!({"stream": stream})));
        let attempt = stage.attempt().await;
        assert!(attempt.sampling().structured_outputs.is_none());
        attempt.say("Let me see. ");
        for piece in CALL.as_bytes().chunks(7) {
            attempt.say(std::str::from_utf8(piece).unwrap());
        }
        attempt.end();
        let answered = answer.await.unwrap();
        if stream {
            let events = answered.events();
            assert_eq!(joined(&events, "content").trim_end(), "Let me see.");
            let calls: Vec<Value> = events
                .iter()
                .flat_map(|event| {
                    event["choices"][0]["delta"]["tool_calls"]
                        .as_array()
                        .cloned()
                        .unwrap_or_default()
                })
                .collect();
            assert_eq!(calls[0]["function"]["name"], "add");
            assert!(
                calls[0]["id"]
                    .as_str()
                    .unwrap()
                    .starts_with("chatcmpl-tool-")
            );
            let arguments: String = calls
                .iter()
                .filter_map(|call| call["function"]["arguments"].as_str())
                .collect();
            assert_eq!(
                serde_json::from_str::<Value>(&arguments).unwrap(),
                json!({"x": 1})
            );
            assert_eq!(
                events[events.len() - 1]["choices"][0]["finish_reason"],
                "tool_calls"
            );
        } else {
            let body = answered.json();
            let message = &body["choices"][0]["message"];
            assert_eq!(
                message["content"].as_str().map(str::trim_end),
                Some("Let me see.")
            );
            assert_eq!(
                message["tool_calls"][0]["function"]["arguments"],
                "{\"x\": 1}"
            );
            assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
        }
    }
}

#[tokio::test]
async fn a_call_that_was_not_asked_for_stays_text() {
    let mut stage = caller().await;
    let answer = stage.ask(CHAT, &with_tools(&json!({"tool_choice": "none"})));
    let attempt = stage.attempt().await;
    attempt.say(CALL);
    attempt.end();
    let body = answer.await.unwrap().json();
    assert_eq!(body["choices"][0]["message"]["content"], CALL);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_required_call_is_forced_in_the_models_own_form() {
    let mut stage = caller().await;
    let answer = stage.ask(CHAT, &with_tools(&json!({"tool_choice": "required"})));
    let attempt = stage.attempt().await;
    let constraint = format!("{:?}", attempt.sampling().structured_outputs);
    assert!(
        constraint.contains("StructuralTag") && constraint.contains("<tool_call>"),
        "{constraint}"
    );
    attempt.say(CALL);
    attempt.end();
    let body = answer.await.unwrap().json();
    let message = &body["choices"][0]["message"];
    assert_eq!(
        (
            &message["content"],
            &message["tool_calls"][0]["function"]["name"]
        ),
        (&json!(""), &json!("add"))
    );
    assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn without_parallel_calls_the_first_is_the_only_one() {
    let mut stage = caller().await;
    let answer = stage.ask(CHAT, &with_tools(&json!({"parallel_tool_calls": false})));
    let attempt = stage.attempt().await;
    attempt.say(CALL);
    attempt.say(CALL);
    attempt.end();
    let body = answer.await.unwrap().json();
    assert_eq!(
        body["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}
