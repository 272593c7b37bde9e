//! What ends an answer early.

use super::*;

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
    let (mut reading, attempt) = stage.begin(CHAT, &body, "text <en").await;
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
