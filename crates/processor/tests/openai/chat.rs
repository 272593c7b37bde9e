//! Chat completions that succeed.

use serde_json::{Value, json};
use stator_common::proto::worker::structured_outputs::Constraint;
use stator_common::proto::worker::{Delta, FinishReason};
use stator_testkit::http::open;
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

#[tokio::test]
async fn a_conversation_is_rendered_and_answered() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"max_tokens": 9, "seed": 4})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.prompt(), "<user>hi<assistant>");
    let sampling = attempt.sampling();
    assert_eq!((sampling.max_tokens, sampling.seed), (9, Some(4)));
    assert_eq!((sampling.temperature, sampling.top_k), (Some(1.0), Some(7)));
    assert_eq!(sampling.eos_token_id, Some(256));
    assert_eq!(sampling.stop_token_ids, [OTHER_END]);
    attempt.send(Delta {
        tokens: tokens("Hel"),
        cached_tokens: Some(16),
        ..Delta::default()
    });
    attempt.say("lo");
    attempt.end();
    let answered = answer.await.unwrap();
    assert_eq!(answered.status, 200, "{answered:?}");
    let body = answered.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "model");
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "Hello");
    assert_eq!(choice["finish_reason"], "stop");
    assert!(choice["stop_reason"].is_null() && choice["logprobs"].is_null());
    assert_eq!(
        body["usage"],
        json!({
            "prompt_tokens": 19, "completion_tokens": 6, "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 16},
        })
    );
}

#[tokio::test]
async fn without_a_limit_the_rest_of_the_context_is_asked_for() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().max_tokens, 512 - 19);
    attempt.end();
    assert_eq!(answer.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_the_usage() {
    let mut stage = Stage::new().await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = stage.ask(CHAT, &hi(&options));
    let attempt = stage.attempt().await;
    attempt.say("Hel");
    attempt.say("lo");
    attempt.finish(&tokens("!"), FinishReason::Length);
    let answered = answer.await.unwrap();
    assert_eq!(
        answered.headers["content-type"],
        "text/event-stream; charset=utf-8"
    );
    let events = answered.events();
    let first = &events[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(
        first["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(streamed(&events, 0), "Hello!");
    let last = &events[events.len() - 2];
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    let usage = &events[events.len() - 1];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);
    assert!(events.iter().all(|event| event["id"] == first["id"]));
    assert!(
        events
            .iter()
            .all(|event| event["created"] == first["created"])
    );
}

#[tokio::test]
async fn each_token_is_on_its_way_before_the_next_is_there() {
    let mut stage = Stage::new().await;
    let body = hi(&json!({"stream": true}));
    let (mut reading, attempt) = tokio::join!(open(stage.addr, CHAT, &body), async {
        let attempt = stage.attempt().await;
        attempt.say("a");
        attempt
    });
    assert_eq!(reading.status, 200);
    for text in ["b", "c"] {
        let before = reading.next().await.unwrap();
        assert!(
            !before.contains(&format!("\"content\":\"{text}\"")),
            "{before}"
        );
        attempt.say(text);
    }
    attempt.end();
    let mut rest = String::new();
    while let Some(piece) = reading.next().await {
        rest.push_str(&piece);
    }
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

#[tokio::test]
async fn continuous_usage_counts_up_with_every_event() {
    let mut stage = Stage::new().await;
    let options = json!({"stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let answer = stage.ask(CHAT, &hi(&options));
    let attempt = stage.attempt().await;
    attempt.finish(&tokens("ab"), FinishReason::Length);
    let events = answer.await.unwrap().events();
    let counts: Vec<_> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [0, 2, 2]);
}

#[tokio::test]
async fn several_choices_have_seeds_and_texts_of_their_own() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"n": 3, "seed": 7})));
    let mut attempts: Vec<Attempt> = Vec::new();
    for _ in 0..3 {
        attempts.push(stage.attempt().await);
    }
    let seeds: Vec<_> = attempts
        .iter()
        .map(|attempt| attempt.sampling().seed)
        .collect();
    assert_eq!(seeds, [Some(7), Some(8), Some(9)]);
    // The last choice is the first to finish.
    for (i, attempt) in attempts.iter().enumerate().rev() {
        attempt.say(&format!("choice {i}"));
        attempt.end();
    }
    let body = answer.await.unwrap().json();
    for i in 0..3 {
        assert_eq!(body["choices"][i]["index"], i);
        assert_eq!(
            body["choices"][i]["message"]["content"],
            format!("choice {i}")
        );
    }
    assert_eq!(body["usage"]["prompt_tokens"], 19);
    assert_eq!(body["usage"]["completion_tokens"], 3 * 9);
}

#[tokio::test]
async fn several_choices_share_a_stream() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"n": 2, "stream": true})));
    let first = stage.attempt().await;
    let second = stage.attempt().await;
    second.say("two");
    second.end();
    first.say("one");
    first.end();
    let events = answer.await.unwrap().events();
    assert_eq!(streamed(&events, 0), "one");
    assert_eq!(streamed(&events, 1), "two");
    let roles = events
        .iter()
        .filter(|event| !event["choices"][0]["delta"]["role"].is_null());
    assert_eq!(roles.count(), 2);
    let ends = events
        .iter()
        .filter(|event| event["choices"][0]["finish_reason"] == "stop");
    assert_eq!(ends.count(), 2);
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_and_the_work() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let answer = stage.ask(
            CHAT,
            &hi(&json!({"stop": ["STOP", "never"], "stream": stream})),
        );
        let attempt = stage.attempt().await;
        attempt.say("one ST");
        attempt.say("op STO");
        attempt.say("P and more");
        assert_eq!(
            stage.cancelled().await,
            attempt.stream,
            "the engine is told"
        );
        let answered = answer.await.unwrap();
        let choice = if stream {
            let events = answered.events();
            assert_eq!(streamed(&events, 0), "one STop ");
            events[events.len() - 1]["choices"][0].clone()
        } else {
            let body = answered.json();
            assert_eq!(body["choices"][0]["message"]["content"], "one STop ");
            // The tokens after the one that completed the stop string do not count.
            assert_eq!(body["usage"]["completion_tokens"], 13);
            body["choices"][0].clone()
        };
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["stop_reason"], "STOP");
    }
}

#[tokio::test]
async fn what_may_become_a_stop_string_is_held_back() {
    let mut stage = Stage::new().await;
    let body = hi(&json!({"stop": "<end>", "stream": true}));
    let (mut reading, attempt) = tokio::join!(open(stage.addr, CHAT, &body), async {
        let attempt = stage.attempt().await;
        attempt.say("text <en");
        attempt
    });
    let mut seen = String::new();
    while !seen.contains("text") {
        seen.push_str(&reading.next().await.unwrap());
    }
    assert!(!seen.contains('<'), "{seen}");
    attempt.say("tity");
    attempt.end();
    while let Some(piece) = reading.next().await {
        seen.push_str(&piece);
    }
    let contents = seen.lines().filter_map(|line| {
        let event: Value = serde_json::from_str(line.strip_prefix("data: ")?).ok()?;
        event["choices"][0]["delta"]["content"]
            .as_str()
            .map(str::to_owned)
    });
    assert_eq!(contents.collect::<String>(), "text <entity");
}

#[tokio::test]
async fn a_stop_token_is_told_apart_from_the_end() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"stop_token_ids": [65]})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().stop_token_ids, [65, OTHER_END]);
    attempt.send(Delta {
        tokens: tokens("xA"),
        finish: FinishReason::Stop.into(),
        stop_token_id: Some(65),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    assert_eq!(body["choices"][0]["message"]["content"], "x");
    assert_eq!(body["choices"][0]["stop_reason"], 65);
    assert_eq!(body["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn characters_are_never_cut_between_events() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"stream": true})));
    let attempt = stage.attempt().await;
    for byte in "né🙂".bytes() {
        attempt.send(Delta {
            tokens: vec![u32::from(byte)],
            ..Delta::default()
        });
        tokio::task::yield_now().await;
    }
    attempt.end();
    let events = answer.await.unwrap().events();
    assert_eq!(streamed(&events, 0), "né🙂");
    assert!(
        events
            .iter()
            .all(|event| !event.to_string().contains('\u{FFFD}'))
    );
}

#[tokio::test]
async fn logprobs_show_the_chosen_token_and_the_most_likely_ones() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"logprobs": true, "top_logprobs": 2})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().logprobs, Some(2));
    attempt.send(Delta {
        tokens: tokens("ab"),
        logprobs: vec![
            // The chosen token is the most likely one; then one that is not among the two.
            position(&[('a', -0.5), ('a', -0.5), ('x', f32::NEG_INFINITY)], 1),
            position(&[('b', -3.0), ('y', -0.25), ('z', -1.0)], 9),
        ],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({"content": [
            {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "x", "logprob": -9999.0, "bytes": [120]},
            ]},
            {"token": "b", "logprob": -3.0, "bytes": [98], "top_logprobs": [
                {"token": "b", "logprob": -3.0, "bytes": [98]},
                {"token": "y", "logprob": -0.25, "bytes": [121]},
            ]},
        ]})
    );
}

#[tokio::test]
async fn tokens_may_be_shown_by_id() {
    let mut stage = Stage::new().await;
    let fields = json!({"logprobs": true, "top_logprobs": 1, "return_tokens_as_token_ids": true,
        "return_token_ids": true});
    let answer = stage.ask(CHAT, &hi(&fields));
    let attempt = stage.attempt().await;
    attempt.send(Delta {
        tokens: tokens("a"),
        logprobs: vec![position(&[('a', -0.5), ('a', -0.5)], 1)],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    let entry = &body["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["token"], "token_id:97");
    assert_eq!(entry["bytes"], json!([97]));
    assert_eq!(body["choices"][0]["token_ids"], json!([97]));
    assert_eq!(body["prompt_token_ids"].as_array().unwrap().len(), 19);
}

#[tokio::test]
async fn prompt_logprobs_come_beside_the_choices() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"prompt_logprobs": 1})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().prompt_logprobs, Some(1));
    assert_eq!(attempt.sampling().skip_reading_prefix_cache, Some(true));
    attempt.send(Delta {
        tokens: tokens("a"),
        prompt_logprobs: vec![position(&[('u', -2.0), ('s', -0.5)], 4)],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    assert_eq!(
        body["prompt_logprobs"],
        json!([null, {
            "117": {"logprob": -2.0, "rank": 4, "decoded_token": "u"},
            "115": {"logprob": -0.5, "rank": 1, "decoded_token": "s"},
        }])
    );
}

#[tokio::test]
async fn a_json_schema_reaches_the_engine_as_it_was_written() {
    let mut stage = Stage::new().await;
    let body = r#"{"messages":[{"role":"user","content":"hi"}],"response_format":{"type":"json_schema",
        "json_schema":{"name":"x","schema":{"type":"object","properties":{"b":{},"a":{}}}}}}"#;
    let answer = stage.ask(CHAT, &serde_json::from_str(body).unwrap());
    let attempt = stage.attempt().await;
    let constraint = attempt
        .sampling()
        .structured_outputs
        .clone()
        .unwrap()
        .constraint
        .unwrap();
    let Constraint::Json(schema) = constraint else {
        panic!("{constraint:?}")
    };
    assert_eq!(schema, r#"{"type":"object","properties":{"b":{},"a":{}}}"#);
    attempt.end();
    assert_eq!(answer.await.unwrap().status, 200);
}

fn tools(choice: &Value) -> Value {
    let tool = |name| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    hi(&json!({"tools": [tool("add"), tool("sub")], "tool_choice": choice}))
}

#[tokio::test]
async fn a_named_tool_gets_the_answer_as_its_arguments() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let mut body = tools(&json!({"type": "function", "function": {"name": "sub"}}));
        body["stream"] = stream.into();
        let answer = stage.ask(CHAT, &body);
        let attempt = stage.attempt().await;
        assert_eq!(attempt.prompt(), "<user>hi[add,sub]<assistant>");
        assert!(attempt.sampling().structured_outputs.is_some());
        attempt.say(r#"{"a""#);
        attempt.say(": 1}");
        attempt.end();
        let answered = answer.await.unwrap();
        if stream {
            let events = answered.events();
            let calls: Vec<&Value> = events
                .iter()
                .map(|event| &event["choices"][0]["delta"]["tool_calls"][0])
                .collect();
            let first = calls.iter().find(|call| !call.is_null()).unwrap();
            assert_eq!(first["function"]["name"], "sub");
            assert_eq!(
                (&first["type"], &first["index"]),
                (&json!("function"), &json!(0))
            );
            let arguments: String = calls
                .iter()
                .filter_map(|call| call["function"]["arguments"].as_str())
                .collect();
            assert_eq!(arguments, r#"{"a": 1}"#);
            assert_eq!(
                events[events.len() - 1]["choices"][0]["finish_reason"],
                "stop"
            );
        } else {
            let body = answered.json();
            let message = &body["choices"][0]["message"];
            assert_eq!(message["content"], "");
            let call = &message["tool_calls"][0];
            assert_eq!(
                call["function"],
                json!({"name": "sub", "arguments": r#"{"a": 1}"#})
            );
            assert!(call["id"].as_str().unwrap().starts_with("chatcmpl-tool-"));
            assert_eq!(body["choices"][0]["finish_reason"], "stop");
        }
    }
}

#[tokio::test]
async fn a_required_call_may_be_any_and_several() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let mut body = tools(&json!("required"));
        body["stream"] = stream.into();
        let answer = stage.ask(CHAT, &body);
        let attempt = stage.attempt().await;
        for piece in [
            r#"[{"name":"add","para"#,
            r#"meters":{"x":"#,
            r#"1}},{"name":"sub","parameters":{}}]"#,
        ] {
            attempt.say(piece);
        }
        attempt.end();
        let answered = answer.await.unwrap();
        if stream {
            let events = answered.events();
            let calls = events.iter().flat_map(|event| {
                event["choices"][0]["delta"]["tool_calls"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default()
            });
            let mut arguments = [String::new(), String::new()];
            for call in calls {
                let index = call["index"].as_u64().unwrap() as usize;
                arguments[index].push_str(call["function"]["arguments"].as_str().unwrap());
            }
            assert_eq!(arguments, [r#"{"x":1}"#, "{}"]);
            assert_eq!(
                events[events.len() - 1]["choices"][0]["finish_reason"],
                "tool_calls"
            );
        } else {
            let body = answered.json();
            let calls = body["choices"][0]["message"]["tool_calls"]
                .as_array()
                .unwrap();
            assert_eq!(
                calls[0]["function"],
                json!({"name": "add", "arguments": r#"{"x": 1}"#})
            );
            assert_eq!(calls[1]["function"]["name"], "sub");
            assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
        }
    }
}

#[tokio::test]
async fn the_last_message_can_be_continued_and_shown() {
    let mut stage = Stage::new().await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "On"}],
        "continue_final_message": true, "add_generation_prompt": false, "echo": true});
    let answer = stage.ask(CHAT, &body);
    let attempt = stage.attempt().await;
    assert_eq!(attempt.prompt(), "<user>hi<assistant>On");
    attempt.say("ce");
    attempt.end();
    let body = answer.await.unwrap().json();
    assert_eq!(body["choices"][0]["message"]["content"], "Once");
}
