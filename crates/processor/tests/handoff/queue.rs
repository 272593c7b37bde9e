//! Prompts that wait at the processor until a prefill worker has room.
//!
//! The workers of these tests compute 64 tokens per step, so a prompt of more than 128 has one for itself.

use serde_json::{Value, json};
use stator_common::Code;
use stator_common::card::Role;
use stator_common::plane::delta::failed;
use stator_common::proto::worker::Leg;
use stator_processor::config::Config;
use stator_testkit::http::{post, send, until};

use crate::stage::{COMPLETIONS, Stage, answer, handed, queued};

/// Returns a prompt that a worker has for itself.
fn long() -> Value {
    json!({"prompt": "x".repeat(200), "max_tokens": 3})
}

/// Waits until so many prompts wait.
async fn until_waiting(stage: &Stage, n: u64) {
    until(stage.addr, "/workers", |answered| {
        answered.json()["models"][0]["prefill_queue"]["requests"] == n
    })
    .await;
}

#[tokio::test]
async fn a_prompt_is_handed_on_as_when_it_is_pushed() {
    let (stage, mut prefill, mut decode) = Stage::with_both(queued()).await;
    let asked = stage.ask_shortly();
    let first = prefill.hand_on("kv-1").await;
    assert_eq!(first.request.leg(), Leg::Prefill);
    let second = decode.attempt().await;
    assert_eq!(second.request.leg(), Leg::Decode);
    assert_eq!(second.request.kv_transfer_params, "kv-1");
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().json()["choices"][0]["text"], "yes");
    assert_eq!(stage.handoffs("done").await, 1);
}

#[tokio::test]
async fn what_does_not_fit_waits_here_and_goes_to_whoever_is_free_first() {
    let mut stage = Stage::new(queued()).await;
    let mut busy = stage.add("p0", Role::Prefill).await;
    let mut decode = stage.add("d0", Role::Decode).await;
    let first = stage.ask(&long());
    let held = busy.attempt().await;
    let second = stage.ask(&long());
    until_waiting(&stage, 1).await;
    let third = stage.ask(&long());
    until_waiting(&stage, 2).await;
    assert!(busy.is_idle());
    // Not bound to a worker yet: one that comes now takes the first that waits.
    let mut new = stage.add("p1", Role::Prefill).await;
    new.hand_on("kv-2").await;
    answer(&decode.attempt().await, "two");
    assert_eq!(second.await.unwrap().json()["choices"][0]["text"], "two");
    new.hand_on("kv-3").await;
    answer(&decode.attempt().await, "three");
    assert_eq!(third.await.unwrap().json()["choices"][0]["text"], "three");
    until_waiting(&stage, 0).await;
    held.send(handed("kv-1"));
    answer(&decode.attempt().await, "one");
    assert_eq!(first.await.unwrap().json()["choices"][0]["text"], "one");
}

#[tokio::test]
async fn short_prompts_are_given_ahead_so_that_no_step_is_waited_for() {
    let (stage, mut prefill, _decode) = Stage::with_both(queued()).await;
    let half = json!({"prompt": "x".repeat(64), "max_tokens": 3});
    let _asked: Vec<_> = (0..3).map(|_| stage.ask(&half)).collect();
    let _running = [prefill.attempt().await, prefill.attempt().await];
    until_waiting(&stage, 1).await;
    assert!(prefill.is_idle());
}

#[tokio::test]
async fn whoever_leaves_or_is_late_waits_no_longer() {
    let (stage, mut prefill, _decode) = Stage::with_both(queued()).await;
    let _first = stage.ask(&long());
    let running = prefill.attempt().await;
    let leaving = stage.ask(&long());
    until_waiting(&stage, 1).await;
    leaving.abort();
    until_waiting(&stage, 0).await;

    let mut late = post(COMPLETIONS, long().to_string());
    let header = late.headers_mut();
    header.insert("x-request-timeout-ms", "50".parse().unwrap());
    let answered = send(stage.addr, late).await;
    assert_eq!(answered.status, 504, "{answered:?}");
    until_waiting(&stage, 0).await;
    // Who comes after them is the next that the worker is given.
    let _next = stage.ask(&json!({"prompt": "y".repeat(200), "max_tokens": 3}));
    until_waiting(&stage, 1).await;
    running.send(handed("kv"));
    assert_eq!(prefill.attempt().await.prompt(), "y".repeat(200));
}

#[tokio::test]
async fn a_client_that_leaves_during_prefill_makes_room_for_the_next() {
    let (stage, mut prefill, _decode) = Stage::with_both(queued()).await;
    let leaving = stage.ask(&json!({"prompt": "x".repeat(200), "stream": true}));
    let first = prefill.attempt().await;
    let _next = stage.ask(&json!({"prompt": "y".repeat(200), "max_tokens": 3}));
    until_waiting(&stage, 1).await;
    assert!(prefill.is_idle());
    leaving.abort();
    assert_eq!(prefill.cancelled().await, first.stream);
    assert_eq!(prefill.attempt().await.prompt(), "y".repeat(200));
    until_waiting(&stage, 0).await;
}

#[tokio::test]
async fn a_prompt_whose_worker_fails_is_first_in_the_queue_again() {
    let mut stage = Stage::new(queued()).await;
    let mut prefills = [
        stage.add("p0", Role::Prefill).await,
        stage.add("p1", Role::Prefill).await,
    ];
    let mut decode = stage.add("d0", Role::Decode).await;
    let first = stage.ask(&long());
    let [p0, p1] = &mut prefills;
    let (failing, at) = tokio::select! {
        attempt = p0.attempt() => (attempt, 0),
        attempt = p1.attempt() => (attempt, 1),
    };
    let _second = stage.ask(&json!({"prompt": "y".repeat(201), "max_tokens": 3}));
    let running = prefills[1 - at].attempt().await;
    let _third = stage.ask(&json!({"prompt": "z".repeat(202), "max_tokens": 3}));
    until_waiting(&stage, 1).await;
    failing.send(failed(0, Code::EngineDead, "the engine died"));
    until_waiting(&stage, 2).await;
    running.send(handed("kv-2"));
    let again = prefills[1 - at].attempt().await;
    assert_eq!(again.request.prompt_tokens, failing.request.prompt_tokens);
    again.send(handed("kv-1"));
    let _other = decode.attempt().await;
    answer(&decode.attempt().await, "yes");
    assert_eq!(first.await.unwrap().status, 200);
}

#[tokio::test]
async fn who_waits_when_the_last_worker_leaves_is_told() {
    let (stage, mut prefill, _decode) = Stage::with_both(queued()).await;
    let _first = stage.ask(&long());
    let _running = prefill.attempt().await;
    let second = stage.ask(&long());
    until_waiting(&stage, 1).await;
    prefill.worker.disconnect().await;
    let answered = second.await.unwrap();
    assert_eq!(answered.status, 503, "{answered:?}");
}

#[tokio::test]
async fn a_full_queue_takes_nobody() {
    let (stage, mut prefill, _decode) = Stage::with_both(Config {
        prefill_queue_limit: 1,
        ..queued()
    })
    .await;
    let _first = stage.ask(&long());
    let _running = prefill.attempt().await;
    let _second = stage.ask(&long());
    until_waiting(&stage, 1).await;
    let refused = stage.ask(&long()).await.unwrap();
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!(refused.error().contains("limit is 1"), "{refused:?}");
}

#[tokio::test]
async fn choices_wait_once_and_follow_to_the_worker_that_has_their_prompt() {
    let mut stage = Stage::new(queued()).await;
    let mut prefill = stage.add("p0", Role::Prefill).await;
    let mut decode = stage.add("d0", Role::Decode).await;
    let _busy = stage.ask(&long());
    let running = prefill.attempt().await;
    let asked = stage.ask(&json!({"prompt": "y".repeat(200), "max_tokens": 3, "n": 3, "seed": 1}));
    until_waiting(&stage, 1).await;
    running.send(handed("kv-busy"));
    let _other = decode.attempt().await;
    let first = prefill.hand_on("kv-0").await;
    for params in ["kv-1", "kv-2"] {
        let next = prefill.hand_on(params).await;
        assert_eq!(next.request.prompt_tokens, first.request.prompt_tokens);
    }
    for _ in 0..3 {
        answer(&decode.attempt().await, "a");
    }
    let answered = asked.await.unwrap().json();
    assert_eq!(answered["choices"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_decode_worker_computes_what_would_wait_behind_too_much() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config {
        disagg_max_prefill_queue: Some(300),
        ..queued()
    })
    .await;
    let _first = stage.ask(&long());
    let _running = prefill.attempt().await;
    let _second = stage.ask(&long());
    until_waiting(&stage, 1).await;
    // 200 tokens are at the worker and 200 wait here.
    let third = stage.ask(&long());
    let attempt = decode.attempt().await;
    assert_eq!(attempt.request.leg(), Leg::Local);
    answer(&attempt, "own");
    assert_eq!(third.await.unwrap().status, 200);
}
