//! Whoever asks is told where a request would go, or went, and why.

use serde_json::json;
use stator_processor::pool::RouterMode;
use stator_testkit::relay::Relay;

use crate::stage::{COMPLETIONS, EXPLAIN, Stage, body, prompt, stored, view};

#[tokio::test]
async fn a_request_is_explained_and_not_sent() {
    let relay = Relay::start([view("a")]).await;
    let mut stage = Stage::new(RouterMode::Kv).await;
    stage.add_told("a", &relay).await;
    stage.add("b").await;
    let asked = prompt('A', 8);
    relay.say(&view("a"), stored(&asked, 6));
    stage
        .until_cache("a", |cache| cache["device_blocks"] == 6)
        .await;

    for _ in 0..3 {
        let explained = stage.send(EXPLAIN, &body(&asked), &[]).await;
        assert_eq!(explained.status, 200, "{explained:?}");
        let explained = explained.json();
        assert_eq!(explained["router_mode"], "kv");
        let way = &explained["prompts"][0];
        assert_eq!(
            (&way["prompt_tokens"], &way["blocks"]),
            (&json!(129), &json!(8))
        );
        let leg = &way["legs"][0];
        assert_eq!(leg["chosen"]["worker"], "a");
        let reason = leg["chosen"]["reason"].as_str().unwrap();
        assert!(reason.contains("of 129 tokens 96 cached"), "{reason}");
        let candidates = leg["candidates"].as_array().unwrap();
        let of = |id| candidates.iter().find(|one| one["worker"] == id).unwrap();
        assert_eq!(of("a")["cached_tokens"]["device"], 96);
        assert_eq!(of("a")["cost"], 33.0);
        assert_eq!(of("b")["uncached_tokens"], 129);
        assert_eq!(of("b")["full"], false);
    }
    for id in ["a", "b"] {
        assert_eq!(stage.worker(id).worker.submitted(), 0);
    }
}

#[tokio::test]
async fn chats_and_several_prompts_are_explained_and_mistakes_are_refused() {
    let mut stage = Stage::new(RouterMode::Approx).await;
    stage.add("a").await;
    let chat = json!({"messages": [{"role": "user", "content": prompt('A', 3)}], "n": 3});
    let explained = stage.send(EXPLAIN, &chat, &[]).await.json();
    assert_eq!(explained["prompts"].as_array().unwrap().len(), 1);
    let several = json!({"prompt": ["one", "two"], "n": 2});
    let explained = stage.send(EXPLAIN, &several, &[]).await.json();
    assert_eq!(explained["prompts"].as_array().unwrap().len(), 2);
    assert_eq!(explained["prompts"][1]["legs"][0]["chosen"]["worker"], "a");
    for bad in [json!({}), json!([]), json!({"prompt": "x", "n": 0})] {
        let refused = stage.send(EXPLAIN, &bad, &[]).await;
        assert_eq!(refused.status, 400, "{refused:?}");
    }
}

#[tokio::test]
async fn an_answer_says_why_its_worker_was_chosen_where_that_is_asked() {
    let mut stage = Stage::new(RouterMode::Kv).await;
    stage.add("a").await;
    stage.add("b").await;
    let asked = prompt('A', 4);
    let first = stage.ask(&asked).await;
    let explain = ("x-stator-route", "explain");
    let answered = stage.send(COMPLETIONS, &body(&asked), &[explain]).await;
    let reason = answered.headers["x-stator-route-reason"].to_str().unwrap();
    assert!(
        reason.starts_with(&format!("agg {first}/0: cheapest of 2")),
        "{reason}"
    );
    assert!(reason.contains("64 cached"), "{reason}");
    let silent = stage.send(COMPLETIONS, &body(&asked), &[]).await;
    assert!(!silent.headers.contains_key("x-stator-route-reason"));

    let streamed = json!({"prompt": asked, "stream": true});
    let answered = stage.send(COMPLETIONS, &streamed, &[explain]).await;
    assert!(answered.headers.contains_key("x-stator-route-reason"));
}
