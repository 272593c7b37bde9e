//! Answers that come piece by piece.

use super::*;

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
    let (mut reading, attempt) = stage.begin(CHAT, &body, "a").await;
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
