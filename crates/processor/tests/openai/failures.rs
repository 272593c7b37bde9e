//! Requests that fail on the way, and clients that go away.

use serde_json::{Value, json};
use stator_common::Code;
use stator_common::plane::delta::failed;
use stator_common::proto::worker::FinishReason;
use stator_testkit::http::open;

use crate::stage::Stage;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_failure_before_the_first_token_is_a_status_even_for_a_stream() {
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "x", "stream": true})),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "x"}], "stream": true}),
        ),
    ] {
        let mut stage = Stage::new().await;
        let answer = stage.ask(path, &body);
        let attempt = stage.attempt().await;
        attempt.send(failed(
            0,
            Code::InvalidRequest,
            "the grammar does not compile",
        ));
        let answered = answer.await.unwrap();
        assert_eq!(answered.status, 400, "{answered:?}");
        assert_eq!(answered.error(), "the grammar does not compile");
    }
}

#[tokio::test]
async fn a_failure_after_the_first_token_ends_a_stream_with_an_error_event() {
    let mut stage = Stage::new().await;
    let body = json!({"prompt": "x", "stream": true});
    let (mut reading, attempt) = stage.begin(COMPLETIONS, &body, "a").await;
    assert_eq!(reading.status, 200);
    let mut seen = reading.next().await.unwrap();
    attempt.send(failed(0, Code::EngineDead, "the engine died"));
    while let Some(piece) = reading.next().await {
        seen.push_str(&piece);
    }
    let rest = seen.strip_suffix("\n\ndata: [DONE]\n\n").unwrap();
    let error = rest.rsplit("data: ").next().unwrap();
    let error: Value = serde_json::from_str(error).unwrap();
    assert_eq!(error["error"]["message"], "the engine died");
    assert_eq!(error["error"]["code"], 503);
}

#[tokio::test]
async fn an_answer_that_the_engine_gave_up_is_a_failure_not_an_end() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(COMPLETIONS, &json!({"prompt": "x"}));
    let attempt = stage.attempt().await;
    attempt.finish(&[], FinishReason::Abort);
    let answered = answer.await.unwrap();
    assert_eq!(answered.status, 503, "{answered:?}");
    assert!(answered.headers.contains_key("retry-after"));

    let body = json!({"prompt": "x", "stream": true});
    let (mut reading, attempt) = stage.begin(COMPLETIONS, &body, "a").await;
    let mut seen = reading.next().await.unwrap();
    attempt.finish(&[], FinishReason::Abort);
    while let Some(piece) = reading.next().await {
        seen.push_str(&piece);
    }
    assert!(seen.contains("\"error\""), "{seen}");
    assert!(!seen.contains("\"abort\""), "{seen}");
}

#[tokio::test]
async fn a_failure_after_the_first_token_is_a_status_without_a_stream() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(COMPLETIONS, &json!({"prompt": "x"}));
    let attempt = stage.attempt().await;
    attempt.say("a");
    attempt.send(failed(0, Code::EngineDead, "the engine died"));
    let answered = answer.await.unwrap();
    assert_eq!(
        (answered.status, answered.error().as_str()),
        (503, "the engine died")
    );
    assert!(answered.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn a_choice_that_fails_ends_the_others() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(COMPLETIONS, &json!({"prompt": "x", "n": 2}));
    let first = stage.attempt().await;
    let second = stage.attempt().await;
    first.say("a");
    second.say("b");
    second.send(failed(0, Code::Internal, "broken"));
    assert_eq!(answer.await.unwrap().status, 500);
    assert_eq!(stage.cancelled().await, first.stream);
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_frees_the_engine() {
    let mut stage = Stage::new().await;
    let body = json!({"prompt": "x", "stream": true});
    let (mut reading, attempt) = stage.begin(COMPLETIONS, &body, "a").await;
    reading.next().await.unwrap();
    reading.leave();
    assert_eq!(stage.cancelled().await, attempt.stream);
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_frees_the_engine() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let body =
            json!({"messages": [{"role": "user", "content": "x"}], "stream": stream, "n": 2});
        let waiting = tokio::spawn({
            let addr = stage.addr;
            async move { open(addr, CHAT, &body).await.status }
        });
        let mut streams = [stage.attempt().await.stream, stage.attempt().await.stream];
        waiting.abort();
        let mut cancelled = [stage.cancelled().await, stage.cancelled().await];
        streams.sort_unstable();
        cancelled.sort_unstable();
        assert_eq!(cancelled, streams);
    }
}
