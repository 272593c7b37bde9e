//! LoRA adapters: models of their own, at the workers that serve them and at no others.

use serde_json::{Value, json};
use stator_common::BlobHash;
use stator_common::events::{Blocks, Change, Medium};
use stator_processor::config::Config;
use stator_processor::pool::RouterMode;
use stator_router::hash;
use stator_testkit::http::{Answered, get, send, until};
use stator_testkit::model;
use stator_testkit::relay::Relay;

use crate::stage::{BLOCK, COMPLETIONS, EXPLAIN, Stage, body, prompt, stored, view};

/// A stage with worker `a`, which serves the adapter `x`, and worker `b`, which does not.
async fn a_has_x(mode: RouterMode) -> Stage {
    let mut stage = Stage::new(mode).await;
    stage
        .add_with("a", |card| card.adapters = vec![model::adapter("x")])
        .await;
    stage.add("b").await;
    stage
}

fn of(name: &str, prompt: &str) -> Value {
    json!({"model": name, "prompt": prompt, "max_tokens": 4})
}

async fn complete(stage: &Stage, name: &str) -> Answered {
    stage.send(COMPLETIONS, &of(name, "abc"), &[]).await
}

fn served(stage: &Stage) -> [u32; 2] {
    ["a", "b"].map(|id| stage.worker(id).worker.submitted())
}

#[tokio::test]
async fn an_adapter_is_listed_as_a_model_and_answers_carry_its_name() {
    let stage = a_has_x(RouterMode::RoundRobin).await;
    let listed = send(stage.addr, get("/v1/models")).await.json();
    let listed = listed["data"].as_array().unwrap().clone();
    let ids: Vec<_> = listed.iter().map(|one| one["id"].clone()).collect();
    assert_eq!(ids, ["model", "org/alias", "x"]);
    let x = &listed[2];
    assert_eq!(
        (&x["root"], &x["parent"]),
        (&json!("/adapters/x"), &json!("model"))
    );
    let one = send(stage.addr, get("/v1/models/x")).await.json();
    assert_eq!(&one, x);

    let answered = complete(&stage, "x").await;
    assert_eq!(answered.json()["model"], "x", "{answered:?}");
    // Who names no model gets the only one: adapters do not count.
    let unnamed = stage
        .send(COMPLETIONS, &json!({"prompt": "abc"}), &[])
        .await;
    assert_eq!(unnamed.json()["model"], "model", "{unnamed:?}");
    let unknown = complete(&stage, "y").await;
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.error(), "the model `y` does not exist");

    let workers = send(stage.addr, get("/workers")).await.json();
    let targets = workers["models"][0]["targets"].as_array().unwrap();
    let adapters: Vec<_> = targets.iter().map(|one| &one["adapters"]).collect();
    assert_eq!(adapters, [&json!(["x"]), &json!([])]);
}

#[tokio::test]
async fn requests_for_an_adapter_go_to_those_who_have_it_and_all_others_everywhere() {
    for mode in [
        RouterMode::RoundRobin,
        RouterMode::Kv,
        RouterMode::LeastLoaded,
    ] {
        let stage = a_has_x(mode).await;
        for _ in 0..4 {
            assert_eq!(complete(&stage, "x").await.status, 200);
        }
        assert_eq!(served(&stage), [4, 0], "{mode:?}");
        let pinned = [("x-stator-worker", "b")];
        let refused = stage.send(COMPLETIONS, &of("x", "abc"), &pinned).await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.error().contains("worker b"), "{refused:?}");
    }
    let stage = a_has_x(RouterMode::RoundRobin).await;
    for _ in 0..6 {
        assert_eq!(complete(&stage, "model").await.status, 200);
    }
    assert_eq!(served(&stage), [3, 3]);
}

#[tokio::test]
async fn without_the_workers_of_an_adapter_it_is_refused_for_now_and_the_model_is_not() {
    let mut stage = a_has_x(RouterMode::RoundRobin).await;
    stage.worker_mut("a").worker.disconnect().await;
    until(stage.addr, "/workers", |answered| {
        answered.text().contains("absent")
    })
    .await;
    let refused = complete(&stage, "x").await;
    assert_eq!(refused.status, 503, "{refused:?}");
    assert_eq!(refused.error(), "no worker with this adapter is connected");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(complete(&stage, "model").await.status, 200);

    // Once it has left, the adapter is none of the models, but may come back.
    stage.remove("a").await;
    until(stage.addr, "/v1/models", |answered| {
        !answered.text().contains("\"x\"")
    })
    .await;
    let refused = complete(&stage, "x").await;
    assert_eq!(
        (refused.status, refused.error().as_str()),
        (503, "the model `x` has no worker at present")
    );
    assert_eq!(complete(&stage, "model").await.status, 200);
}

#[tokio::test]
async fn a_worker_whose_adapter_is_another_one_waits_until_the_first_has_left() {
    let mut stage = a_has_x(RouterMode::RoundRobin).await;
    let other = model::adapter("x");
    stage
        .add_unused("c", |card| {
            card.adapters = vec![stator_common::card::Adapter {
                hash: BlobHash::of(b"others"),
                ..other
            }];
        })
        .await;
    stage
        .add_unused("d", |card| {
            card.adapters = vec![model::adapter("org/alias")];
        })
        .await;
    let unused = |answered: &Answered| {
        let all = answered.json()["unused"].as_array().unwrap().clone();
        all.iter()
            .map(|one| (one["worker"].clone(), one["reason"].clone()))
            .collect::<Vec<_>>()
    };
    let known = until(stage.addr, "/workers", |answered| {
        unused(answered).len() == 2
    })
    .await;
    assert_eq!(
        unused(&known),
        [
            (
                json!("c"),
                json!("other workers serve another adapter as x")
            ),
            (
                json!("d"),
                json!("its adapter org/alias has a name of its model")
            ),
        ]
    );
    stage.remove("a").await;
    until(stage.addr, "/workers", |answered| {
        unused(answered).len() == 1
    })
    .await;
    until(stage.addr, "/v1/models/x", |answered| {
        answered.status == 200
    })
    .await;
    // It was looked at again, and is refused for the same reason: that is no news.
    let counted = send(stage.addr, get("/metrics")).await;
    assert!(counted.text().contains("workers_refused_total 2"));
}

#[tokio::test]
async fn blocks_of_an_adapter_are_not_those_of_the_model() {
    let relay = Relay::start([view("a"), view("b")]).await;
    let mut stage = Stage::with(Config {
        router_mode: RouterMode::Kv,
        ..Config::default()
    })
    .await;
    for id in ["a", "b"] {
        let events = relay.events();
        stage
            .add_with(id, |card| {
                card.kv_events = Some(events);
                card.adapters = vec![model::adapter("x")];
            })
            .await;
    }
    let asked = prompt('A', 8);
    let hashes = hash::blocks(hash::root("x", ""), &model::tokens(&asked), BLOCK);
    let adapted = Blocks {
        medium: Medium::Gpu,
        hashes: hashes.iter().map(|hash| hash.0).collect(),
    };
    relay.say(&view("a"), stored(&asked, 8));
    relay.say(&view("b"), Change::Stored(adapted));
    for id in ["a", "b"] {
        stage
            .until_cache(id, |cache| cache["device_blocks"] == 8)
            .await;
    }
    for (name, home) in [("model", "a"), ("x", "b")] {
        let explained = stage.send(EXPLAIN, &of(name, &asked), &[]).await.json();
        assert_eq!(explained["model"], name);
        let leg = &explained["prompts"][0]["legs"][0];
        assert_eq!(leg["chosen"]["worker"], home, "{leg}");
        let candidates = leg["candidates"].as_array().unwrap();
        let cached = |id| {
            let candidate = candidates.iter().find(|one| one["worker"] == id);
            candidate.unwrap()["cached_tokens"]["device"].clone()
        };
        let of_home = |id| if id == home { 128 } else { 0 };
        assert_eq!(
            (cached("a"), cached("b")),
            (json!(of_home("a")), json!(of_home("b")))
        );
    }
}

#[tokio::test]
async fn only_those_who_have_an_adapter_are_candidates_in_an_explanation() {
    let stage = a_has_x(RouterMode::Kv).await;
    let candidates = |explained: Answered| {
        let all = explained.json()["prompts"][0]["legs"][0]["candidates"].clone();
        all.as_array().unwrap().len()
    };
    let explained = stage.send(EXPLAIN, &of("x", "abc"), &[]).await;
    assert_eq!(candidates(explained), 1);
    let explained = stage.send(EXPLAIN, &body("abc"), &[]).await;
    assert_eq!(candidates(explained), 2);
}
