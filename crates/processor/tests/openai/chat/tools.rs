//! Answers that call tools.

use super::*;

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
