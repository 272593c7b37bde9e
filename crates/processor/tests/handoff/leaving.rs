//! Clients that leave, at every point of a hand-off: nothing goes on for them, and no KV stays behind.

use serde_json::json;
use stator_common::proto::worker::{Delta, FinishReason, Leg};
use stator_processor::config::Config;
use stator_testkit::http::open;

use crate::stage::{COMPLETIONS, Stage, handed};

async fn a_client_that_leaves_during_prefill_stops_it(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let asked = stage.ask_shortly();
    let attempt = prefill.attempt().await;
    asked.abort();
    assert_eq!(prefill.cancelled().await, attempt.stream);
    assert!(decode.is_idle());
}

async fn kv_that_crosses_the_cancel_is_given_back(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let asked = stage.ask_shortly();
    let attempt = prefill.attempt().await;
    asked.abort();
    prefill.cancelled().await;
    attempt.send(handed("kv-crossed"));
    let release = decode.attempt().await;
    assert_eq!(release.request.leg(), Leg::Release);
    assert_eq!(release.request.kv_transfer_params, "kv-crossed");
    release.send(Delta {
        finish: FinishReason::Abort.into(),
        ..Delta::default()
    });
    while stage.handoffs("released").await == 0 {
        tokio::task::yield_now().await;
    }
}

async fn a_client_that_leaves_before_the_first_token_stops_decode(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let asked = stage.ask_shortly();
    prefill.hand_on("kv").await;
    let attempt = decode.attempt().await;
    asked.abort();
    // The decode engine answers for the KV from here on: an aborted fetch frees it.
    assert_eq!(decode.cancelled().await, attempt.stream);
    assert!(decode.is_idle());
}

async fn a_client_that_leaves_a_stream_stops_decode(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let body = json!({"prompt": "abc", "stream": true});
    let (mut reading, attempt) = tokio::join!(open(stage.addr, COMPLETIONS, &body), async {
        prefill.hand_on("kv").await;
        let attempt = decode.attempt().await;
        attempt.say("a");
        attempt
    });
    reading.next().await.unwrap();
    reading.leave();
    assert_eq!(decode.cancelled().await, attempt.stream);
}

both_ways!(
    a_client_that_leaves_during_prefill_stops_it,
    kv_that_crosses_the_cancel_is_given_back,
    a_client_that_leaves_before_the_first_token_stops_decode,
    a_client_that_leaves_a_stream_stops_decode,
);
