//! What requests themselves say about where they go.

use serde_json::json;
use stator_processor::config::{Config, SessionAffinity};
use stator_processor::pool::RouterMode;

use crate::stage::{COMPLETIONS, Stage, body, prompt};

const WORKER: &str = "x-stator-worker";
const SESSION: &str = "x-stator-session";
const ROUTE: &str = "x-stator-route";

#[tokio::test]
async fn a_named_worker_answers_and_one_that_cannot_is_said() {
    let mut stage = Stage::new(RouterMode::Direct).await;
    for id in ["a", "b", "c"] {
        stage.add(id).await;
    }
    for id in ["b", "b", "c"] {
        assert_eq!(stage.ask_with("x", &[(WORKER, id)]).await, id);
    }
    let missing = stage.send(COMPLETIONS, &body("x"), &[]).await;
    assert_eq!(missing.status, 400);
    assert!(missing.error().contains(WORKER), "{missing:?}");
    let gone = stage.send(COMPLETIONS, &body("x"), &[(WORKER, "z")]).await;
    assert_eq!(gone.status, 503);
    assert!(gone.error().contains('z'), "{gone:?}");
}

#[tokio::test]
async fn a_session_keeps_its_worker_whatever_the_mode() {
    for mode in [RouterMode::RoundRobin, RouterMode::Kv] {
        let mut stage = Stage::new(mode).await;
        for id in ["a", "b", "c"] {
            stage.add(id).await;
        }
        let first = stage.ask_with("one", &[(SESSION, "s")]).await;
        for nth in 1..6 {
            let asked = prompt('A', nth);
            assert_eq!(stage.ask_with(&asked, &[(SESSION, "s")]).await, first);
        }
    }
}

#[tokio::test]
async fn a_user_is_a_session_only_where_that_is_configured() {
    let config = |session_affinity| Config {
        router_mode: RouterMode::RoundRobin,
        session_affinity,
        ..Config::default()
    };
    for (affinity, workers) in [(SessionAffinity::User, 1), (SessionAffinity::Header, 2)] {
        let mut stage = Stage::with(config(affinity)).await;
        for id in ["a", "b"] {
            stage.add(id).await;
        }
        let asked = json!({"prompt": "x", "user": "somebody"});
        for _ in 0..4 {
            assert_eq!(stage.send(COMPLETIONS, &asked, &[]).await.status, 200);
        }
        let used = ["a", "b"].map(|id| stage.worker(id).worker.submitted() > 0);
        assert_eq!(used.iter().filter(|used| **used).count(), workers);
    }
}

#[tokio::test]
async fn a_request_may_ask_for_another_mode() {
    let mut stage = Stage::new(RouterMode::Kv).await;
    for id in ["a", "b"] {
        stage.add(id).await;
    }
    let asked = prompt('A', 6);
    let first = stage.ask(&asked).await;
    assert_eq!(stage.ask(&asked).await, first);
    let turns = [(ROUTE, "mode=round-robin")];
    let workers = [
        stage.ask_with(&asked, &turns).await,
        stage.ask_with(&asked, &turns).await,
    ];
    assert_ne!(workers[0], workers[1]);
    let refused = stage
        .send(COMPLETIONS, &body("x"), &[(ROUTE, "mode=best")])
        .await;
    assert_eq!(refused.status, 400);
}
