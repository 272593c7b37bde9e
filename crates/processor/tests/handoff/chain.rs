//! Hand-offs in which nothing fails.

use serde_json::json;
use stator_common::card::{Card, Role};
use stator_common::proto::worker::{Delta, Leg, TokenLogprobs};
use stator_processor::config::{ConditionalMode, Config};
use stator_testkit::model;

use stator_testkit::http::until;

use crate::stage::{Stage, answer, handed, pushed};

async fn decode_goes_on_with_what_prefill_handed_over(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let body = json!({"prompt": "abc", "max_tokens": 3, "seed": 7, "logprobs": 1});
    let asked = stage.ask(&body);
    let first = prefill.hand_on("kv-1").await;
    assert_eq!(first.request.leg(), Leg::Prefill);
    assert!(first.request.kv_transfer_params.is_empty());
    let second = decode.attempt().await;
    assert_eq!(second.request.leg(), Leg::Decode);
    assert_eq!(second.request.kv_transfer_params, "kv-1");
    assert_eq!(second.request.prompt_tokens, first.request.prompt_tokens);
    assert_eq!(second.sampling(), first.sampling());
    second.send(Delta {
        // The decode engine calls all of the prompt cached.
        cached_tokens: Some(3),
        ..Delta::default()
    });
    answer(&second, "yes");
    let answered = asked.await.unwrap().json();
    assert_eq!(answered["choices"][0]["text"], "yes", "{answered}");
    assert_eq!(
        answered["usage"]["prompt_tokens_details"]["cached_tokens"], 2,
        "{answered}"
    );
    assert_eq!(stage.handoffs("done").await, 1);
    assert_eq!(stage.handoffs("released").await, 0);
}

#[tokio::test]
async fn choices_of_a_prompt_are_one_prompt_to_compute() {
    let (stage, mut prefill, _decode) = Stage::with_both(pushed()).await;
    let _asked = stage.ask(&json!({"prompt": "x".repeat(200), "max_tokens": 3, "n": 3}));
    prefill.attempt().await;
    until(stage.addr, "/workers", |answered| {
        let targets = answered.json()["models"][0]["targets"].clone();
        let mut targets = targets.as_array().into_iter().flatten();
        targets.any(|target| {
            let booked = &target["booked"];
            target["role"] == "prefill" && booked["requests"] == 3 && booked["prompts"] == 1
        })
    })
    .await;
}

async fn log_probabilities_of_the_prompt_come_from_the_engine_that_computed_it(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(config.clone()).await;
    let asked = stage.ask(&json!({"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 0}));
    let first = prefill.attempt().await;
    assert_eq!(first.sampling().prompt_logprobs, Some(0));
    let row = |token: u8| TokenLogprobs {
        tokens: vec![u32::from(token)],
        logprobs: vec![-0.5],
        rank: 1,
    };
    first.send(Delta {
        prompt_logprobs: vec![row(b'b'), row(b'c')],
        ..handed("kv")
    });
    let second = decode.attempt().await;
    assert_eq!(second.sampling().prompt_logprobs, None);
    assert_eq!(second.sampling().skip_reading_prefix_cache, None);
    answer(&second, "d");
    let answered = asked.await.unwrap().json();
    let rows = answered["choices"][0]["prompt_logprobs"]
        .as_array()
        .unwrap();
    assert_eq!(rows.len(), 3, "{answered}");
    assert_eq!(rows[2]["99"]["logprob"], -0.5, "{answered}");
}

async fn choices_have_a_hand_off_each_but_the_prompt_is_computed_once(config: Config) {
    let mut stage = Stage::new(config.clone()).await;
    let mut prefills = [
        stage.add("p0", Role::Prefill).await,
        stage.add("p1", Role::Prefill).await,
    ];
    let mut decode = stage.add("d0", Role::Decode).await;
    let asked = stage.ask(&json!({"prompt": "abc", "max_tokens": 3, "n": 3, "seed": 1}));
    let [p0, p1] = &mut prefills;
    let (attempt, at) = tokio::select! {
        attempt = p0.attempt() => (attempt, 0),
        attempt = p1.attempt() => (attempt, 1),
    };
    // The others wait for it.
    assert!(p0.is_idle() && p1.is_idle());
    attempt.send(handed("kv-0"));
    let first = decode.attempt().await;
    assert_eq!(first.request.kv_transfer_params, "kv-0");
    prefills[at].hand_on("kv-1").await;
    prefills[at].hand_on("kv-2").await;
    assert!(prefills[1 - at].is_idle());
    let others = [decode.attempt().await, decode.attempt().await];
    let mut params: Vec<_> = others
        .iter()
        .map(|a| a.request.kv_transfer_params.clone())
        .collect();
    params.sort();
    assert_eq!(params, ["kv-1", "kv-2"]);
    for (attempt, text) in [&first, &others[0], &others[1]]
        .into_iter()
        .zip(["a", "b", "c"])
    {
        answer(attempt, text);
    }
    let answered = asked.await.unwrap().json();
    assert_eq!(answered["choices"].as_array().unwrap().len(), 3);
}

async fn prompts_too_short_for_a_hand_off_stay_with_the_decode_worker(config: Config) {
    let (stage, mut prefill, mut decode) = Stage::with_both(Config {
        conditional_disagg: Some(ConditionalMode::Fixed),
        disagg_min_prefill_tokens: Some(4),
        ..config.clone()
    })
    .await;
    let short = stage.ask(&json!({"prompt": "abc", "max_tokens": 3}));
    let attempt = decode.attempt().await;
    assert_eq!(attempt.request.leg(), Leg::Local);
    answer(&attempt, "own");
    assert_eq!(short.await.unwrap().json()["choices"][0]["text"], "own");

    let long = stage.ask(&json!({"prompt": "abcd", "max_tokens": 3}));
    prefill.hand_on("kv").await;
    let attempt = decode.attempt().await;
    assert_eq!(attempt.request.leg(), Leg::Decode);
    answer(&attempt, "far");
    assert_eq!(long.await.unwrap().status, 200);
    assert_eq!(stage.handoffs("local").await, 1);
}

async fn prefill_workers_are_chosen_by_the_tokens_that_wait_there(config: Config) {
    let mut stage = Stage::new(config.clone()).await;
    let mut prefills = [
        stage.add("p0", Role::Prefill).await,
        stage.add("p1", Role::Prefill).await,
    ];
    let _decode = stage.add("d0", Role::Decode).await;
    let long = "x".repeat(100);
    let _long = stage.ask(&json!({"prompt": long, "max_tokens": 3}));
    let [p0, p1] = &mut prefills;
    let (_attempt, at) = tokio::select! {
        attempt = p0.attempt() => (attempt, 0),
        attempt = p1.attempt() => (attempt, 1),
    };
    // Three requests of few tokens weigh less than one of many.
    let _short: Vec<_> = (0..3).map(|_| stage.ask_shortly()).collect();
    for _ in 0..3 {
        prefills[1 - at].attempt().await;
    }
    assert!(prefills[at].is_idle());
}

async fn aggregated_workers_serve_while_a_half_is_missing(config: Config) {
    let mut stage = Stage::new(config.clone()).await;
    let mut agg = stage.add("a0", Role::Agg).await;
    let mut prefill = stage.add("p0", Role::Prefill).await;
    let asked = stage.ask_shortly();
    let attempt = agg.attempt().await;
    assert_eq!(attempt.request.leg(), Leg::Unspecified);
    answer(&attempt, "all");
    assert_eq!(asked.await.unwrap().status, 200);
    assert!(prefill.is_idle());

    let mut decode = stage.add("d0", Role::Decode).await;
    let asked = stage.ask_shortly();
    prefill.hand_on("kv").await;
    answer(&decode.attempt().await, "two");
    assert_eq!(asked.await.unwrap().json()["choices"][0]["text"], "two");
}

async fn only_workers_of_one_build_and_connector_are_paired(config: Config) {
    let mut stage = Stage::new(config.clone()).await;
    let mut newer = stage
        .add_with("p-new", Role::Prefill, |card| {
            card.model.vllm_version = "0.99.0".to_owned();
        })
        .await;
    let mut decode = stage.add("d0", Role::Decode).await;
    let answered = stage.ask_shortly().await.unwrap();
    assert_eq!(answered.status, 503);
    assert!(answered.error().contains("fit each other"), "{answered:?}");

    let mut prefill = stage.add("p-same", Role::Prefill).await;
    for _ in 0..3 {
        let asked = stage.ask_shortly();
        prefill.hand_on("kv").await;
        answer(&decode.attempt().await, "yes");
        assert_eq!(asked.await.unwrap().status, 200);
    }
    assert!(newer.is_idle());
}

async fn an_adapter_needs_a_worker_of_each_role_that_has_it(config: Config) {
    let mut stage = Stage::new(config.clone()).await;
    let has_x = |card: &mut Card| card.adapters = vec![model::adapter("x")];
    let mut prefill = stage.add_with("p-x", Role::Prefill, has_x).await;
    let mut plain = stage.add("d-plain", Role::Decode).await;
    let body = json!({"model": "x", "prompt": "abc", "max_tokens": 3});
    let answered = stage.ask(&body).await.unwrap();
    assert_eq!(answered.status, 503);
    assert!(
        answered.error().contains("no decode worker with it is"),
        "{answered:?}"
    );

    let mut decode = stage.add_with("d-x", Role::Decode, has_x).await;
    for _ in 0..3 {
        let asked = stage.ask(&body);
        let first = prefill.hand_on("kv").await;
        let second = decode.attempt().await;
        answer(&second, "yes");
        assert_eq!(asked.await.unwrap().json()["model"], "x");
        assert_eq!(
            (&first.request.lora[..], &second.request.lora[..]),
            ("x", "x")
        );
    }
    assert!(plain.is_idle());

    // Where only aggregated workers have it, they serve it.
    let mut agg = stage
        .add_with("a-y", Role::Agg, |card| {
            card.adapters = vec![model::adapter("y")];
        })
        .await;
    let asked = stage.ask(&json!({"model": "y", "prompt": "abc", "max_tokens": 3}));
    let attempt = agg.attempt().await;
    assert_eq!(attempt.request.lora, "y");
    answer(&attempt, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

both_ways!(
    an_adapter_needs_a_worker_of_each_role_that_has_it,
    decode_goes_on_with_what_prefill_handed_over,
    log_probabilities_of_the_prompt_come_from_the_engine_that_computed_it,
    choices_have_a_hand_off_each_but_the_prompt_is_computed_once,
    prompts_too_short_for_a_hand_off_stay_with_the_decode_worker,
    prefill_workers_are_chosen_by_the_tokens_that_wait_there,
    aggregated_workers_serve_while_a_half_is_missing,
    only_workers_of_one_build_and_connector_are_paired,
);
