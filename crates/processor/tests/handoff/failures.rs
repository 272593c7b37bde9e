//! Hand-offs in which a worker, an engine or the way between two fails: every request ends in an answer or in a
//! typed error.

use serde_json::json;
use stator_common::card::Role;
use stator_common::plane::delta::failed;
use stator_common::proto::worker::{Delta, FinishReason, Leg};
use stator_common::{Card, Code};
use stator_processor::config::Config;
use stator_testkit::http::{open, post, send};

use crate::stage::{COMPLETIONS, Stage, answer, handed, refused};

#[tokio::test]
async fn one_half_alone_serves_nobody_and_says_which_is_missing() {
    for (role, missing) in [
        (Role::Prefill, "no decode worker"),
        (Role::Decode, "no prefill worker"),
    ] {
        let mut stage = Stage::new(Config::default()).await;
        let mut worker = stage.add("w", role).await;
        let answered = stage.ask_shortly().await.unwrap();
        assert_eq!(answered.status, 503);
        assert!(answered.headers.contains_key("retry-after"));
        assert!(answered.error().contains(missing), "{answered:?}");
        assert!(worker.is_idle(), "a silent prefill");
    }
}

#[tokio::test]
async fn a_prefill_worker_that_fails_is_replaced() {
    let mut stage = Stage::new(Config::default()).await;
    let mut prefills = [
        stage.add("p0", Role::Prefill).await,
        stage.add("p1", Role::Prefill).await,
    ];
    let mut decode = stage.add("d0", Role::Decode).await;
    let asked = stage.ask_shortly();
    let [p0, p1] = &mut prefills;
    let (attempt, at) = tokio::select! {
        attempt = p0.attempt() => (attempt, 0),
        attempt = p1.attempt() => (attempt, 1),
    };
    attempt.send(failed(0, Code::EngineDead, "the engine died"));
    prefills[1 - at].hand_on("kv").await;
    answer(&decode.attempt().await, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_prefill_worker_that_dies_is_replaced() {
    let mut stage = Stage::new(Config::default()).await;
    let mut prefills = [
        stage.add("p0", Role::Prefill).await,
        stage.add("p1", Role::Prefill).await,
    ];
    let mut decode = stage.add("d0", Role::Decode).await;
    let asked = stage.ask_shortly();
    let [p0, p1] = &mut prefills;
    let at = tokio::select! {
        _ = p0.attempt() => 0,
        _ = p1.attempt() => 1,
    };
    prefills[at].worker.disconnect().await;
    prefills[1 - at].hand_on("kv").await;
    answer(&decode.attempt().await, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_prompt_at_fault_is_not_tried_elsewhere() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let asked = stage.ask_shortly();
    let attempt = prefill.attempt().await;
    attempt.send(failed(0, Code::InvalidRequest, "no such token"));
    assert_eq!(asked.await.unwrap().status, 400);
    assert!(prefill.is_idle() && decode.is_idle());
}

#[tokio::test]
async fn a_prefill_that_hands_nothing_on_is_no_success() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let asked = stage.ask_shortly();
    prefill.attempt().await.finish(&[1], FinishReason::Length);
    assert_eq!(asked.await.unwrap().status, 500);
    assert!(decode.is_idle());
}

#[tokio::test]
async fn a_decode_worker_that_takes_nothing_new_leaves_the_kv_to_another() {
    let mut stage = Stage::new(Config::default()).await;
    let mut prefill = stage.add("p0", Role::Prefill).await;
    let mut decodes = [
        stage.add("d0", Role::Decode).await,
        stage.add("d1", Role::Decode).await,
    ];
    let asked = stage.ask_shortly();
    prefill.hand_on("kv-1").await;
    let [d0, d1] = &mut decodes;
    let (attempt, at) = tokio::select! {
        attempt = d0.attempt() => (attempt, 0),
        attempt = d1.attempt() => (attempt, 1),
    };
    attempt.send(refused(Code::Draining));
    let second = decodes[1 - at].attempt().await;
    assert_eq!(second.request.kv_transfer_params, "kv-1");
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
    assert!(prefill.is_idle(), "computed twice");
}

#[tokio::test]
async fn a_rank_without_an_engine_leaves_the_kv_to_the_others_of_its_worker() {
    let mut stage = Stage::new(Config::default()).await;
    let mut prefill = stage.add("p0", Role::Prefill).await;
    let ranks = |card: &mut Card| card.model.dp_size = 3;
    let mut decode = stage.add_ranks("d0", Role::Decode, 3, ranks).await;
    let asked = stage.ask_shortly();
    prefill.hand_on("kv-1").await;
    let first = decode.attempt().await;
    first.send(refused(Code::Unavailable));
    let second = decode.attempt().await;
    assert_ne!(first.request.dp_rank, second.request.dp_rank);
    assert_eq!(second.request.kv_transfer_params, "kv-1");
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
    assert!(prefill.is_idle(), "computed twice");

    // It is avoided for a while; the others are not.
    for _ in 0..2 {
        let asked = stage.ask_shortly();
        prefill.hand_on("kv").await;
        let attempt = decode.attempt().await;
        assert_ne!(attempt.request.dp_rank, first.request.dp_rank);
        answer(&attempt, "yes");
        assert_eq!(asked.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn a_decode_worker_is_told_until_when_it_may_fetch() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let asked = stage.ask_shortly();
    assert_eq!(prefill.hand_on("kv").await.request.kv_lease_ms, None);
    let attempt = decode.attempt().await;
    let lease = attempt.request.kv_lease_ms.unwrap();
    assert!((20_000..30_000).contains(&lease), "{lease}");
    answer(&attempt, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn workers_that_do_not_fit_each_other_leave_requests_to_those_that_do_all() {
    let mut stage = Stage::new(Config::default()).await;
    let _prefill = stage.add("p0", Role::Prefill).await;
    let other = |card: &mut Card| card.handoff.as_mut().unwrap().connector = "Other".to_owned();
    let _decode = stage.add_with("d0", Role::Decode, other).await;
    let mut agg = stage.add("a0", Role::Agg).await;
    let asked = stage.ask_shortly();
    answer(&agg.attempt().await, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn kv_that_a_dead_decode_engine_may_have_touched_is_computed_again() {
    for code in [Code::EngineDead, Code::HandoffFailed] {
        let mut stage = Stage::new(Config::default()).await;
        let mut prefill = stage.add("p0", Role::Prefill).await;
        let mut decodes = [
            stage.add("d0", Role::Decode).await,
            stage.add("d1", Role::Decode).await,
        ];
        let asked = stage.ask_shortly();
        prefill.hand_on("kv-1").await;
        let [d0, d1] = &mut decodes;
        let (attempt, at) = tokio::select! {
            attempt = d0.attempt() => (attempt, 0),
            attempt = d1.attempt() => (attempt, 1),
        };
        attempt.send(failed(0, code, "gone"));
        prefill.hand_on("kv-2").await;
        let second = decodes[1 - at].attempt().await;
        assert_eq!(second.request.kv_transfer_params, "kv-2");
        answer(&second, "yes");
        assert_eq!(asked.await.unwrap().status, 200);
        assert_eq!(stage.handoffs("failed").await, 1);
    }
}

#[tokio::test]
async fn a_pair_that_keeps_failing_ends_in_a_typed_error() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let asked = stage.ask_shortly();
    for _ in 0..4 {
        prefill.hand_on("kv").await;
        let attempt = decode.attempt().await;
        attempt.send(failed(
            0,
            Code::HandoffFailed,
            "the KV could not be fetched",
        ));
    }
    let answered = asked.await.unwrap();
    assert_eq!(answered.status, 503);
    assert!(answered.headers.contains_key("retry-after"));
    assert_eq!(answered.error(), "the KV could not be fetched");
}

#[tokio::test]
async fn a_lease_that_is_over_is_never_used() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let asked = stage.ask_shortly();
    prefill.attempt().await.send(Delta {
        kv_lease_ms: Some(0),
        ..handed("kv-over")
    });
    prefill.hand_on("kv-fresh").await;
    let attempt = decode.attempt().await;
    assert_eq!(attempt.request.kv_transfer_params, "kv-fresh");
    answer(&attempt, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
    assert_eq!(stage.handoffs("expired").await, 1);
    // What the engine has taken back already is not given back again.
    assert!(decode.is_idle());
}

#[tokio::test]
async fn the_time_of_a_request_bounds_all_its_legs_together() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let ask = |milliseconds: &str| {
        let mut request = post(COMPLETIONS, json!({"prompt": "abc"}).to_string());
        let value = milliseconds.parse().unwrap();
        request.headers_mut().insert("x-request-timeout-ms", value);
        tokio::spawn(send(stage.addr, request))
    };
    let late = ask("50");
    let attempt = prefill.attempt().await;
    assert!(attempt.request.deadline_ms.is_some_and(|left| left <= 50));
    assert_eq!(late.await.unwrap().status, 504);
    assert_eq!(prefill.cancelled().await, attempt.stream);

    let in_time = ask("60000");
    prefill.hand_on("kv").await;
    let attempt = decode.attempt().await;
    assert!(
        attempt
            .request
            .deadline_ms
            .is_some_and(|left| left <= 60_000)
    );
    answer(&attempt, "yes");
    assert_eq!(in_time.await.unwrap().status, 200);

    let bad = ask("soon").await.unwrap();
    assert_eq!(bad.status, 400);
    assert_eq!(bad.json()["error"]["param"], "x-request-timeout-ms");
}

#[tokio::test]
async fn a_failure_after_the_first_token_is_told_and_not_repeated() {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config::default()).await;
    let body = json!({"prompt": "abc", "stream": true});
    let (mut reading, attempt) = tokio::join!(open(stage.addr, COMPLETIONS, &body), async {
        prefill.hand_on("kv").await;
        let attempt = decode.attempt().await;
        attempt.say("a");
        attempt
    });
    let mut seen = reading.next().await.unwrap();
    assert_eq!(attempt.request.leg(), Leg::Decode);
    attempt.send(failed(0, Code::EngineDead, "the engine died"));
    while let Some(piece) = reading.next().await {
        seen.push_str(&piece);
    }
    assert!(seen.contains("the engine died"), "{seen}");
    assert!(prefill.is_idle());
}
