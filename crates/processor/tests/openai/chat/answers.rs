//! Whole answers, and what reaches the worker for them.

use super::*;

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
