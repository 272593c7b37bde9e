//! What workers' caches hold decides, known from a relay or from what was sent there.

use std::sync::atomic::Ordering;

use stator_common::events::Change;
use stator_processor::pool::RouterMode;
use stator_testkit::http::{get, send};
use stator_testkit::relay::Relay;

use crate::stage::{BLOCK, Stage, blocks, prompt, stored, view};

async fn two_told() -> (Stage, Relay) {
    let relay = Relay::start([view("a"), view("b")]).await;
    let mut stage = Stage::new(RouterMode::Kv).await;
    stage.add_told("a", &relay).await;
    stage.add_told("b", &relay).await;
    (stage, relay)
}

#[tokio::test]
async fn a_prompt_goes_to_the_worker_whose_relay_says_that_it_has_it() {
    let (stage, relay) = two_told().await;
    let (one, two) = (prompt('A', 8), prompt('B', 8));
    relay.say(&view("a"), stored(&one, 8));
    relay.say(&view("b"), stored(&two, 8));
    for id in ["a", "b"] {
        stage
            .until_cache(id, |cache| cache["device_blocks"] == 8)
            .await;
    }
    for _ in 0..4 {
        assert_eq!(stage.ask(&one).await, "a");
        assert_eq!(stage.ask(&two).await, "b");
    }
}

#[tokio::test]
async fn what_a_worker_no_longer_has_does_not_attract() {
    let (stage, relay) = two_told().await;
    let asked = prompt('A', 8);
    relay.say(&view("a"), stored(&asked, 8));
    relay.say(&view("b"), stored(&asked, 4));
    relay.say(&view("a"), Change::Removed(blocks(&asked, 6)));
    stage
        .until_cache("a", |cache| cache["device_blocks"] == 2)
        .await;
    stage
        .until_cache("b", |cache| cache["device_blocks"] == 4)
        .await;
    assert_eq!(stage.ask(&asked).await, "b");
}

#[tokio::test]
async fn a_second_turn_follows_the_first_where_nobody_tells() {
    for mode in [RouterMode::Approx, RouterMode::Kv] {
        let mut stage = Stage::new(mode).await;
        for id in ["a", "b", "c"] {
            stage.add(id).await;
        }
        for name in ['A', 'B', 'C', 'D'] {
            let first = prompt(name, 6);
            let worker = stage.ask(&first).await;
            for turn in 2..5 {
                assert_eq!(stage.ask(&first.repeat(turn)).await, worker, "{mode}");
            }
        }
        let workers = send(stage.addr, get("/workers")).await.text().to_owned();
        assert!(workers.contains("\"known_from\":\"routing\""), "{workers}");
    }
}

#[tokio::test]
async fn a_worker_whose_relay_falls_silent_is_known_by_what_it_is_sent() {
    let (stage, relay) = two_told().await;
    let asked = prompt('A', 8);
    relay.say(&view("a"), stored(&asked, 8));
    stage
        .until_cache("a", |cache| cache["device_blocks"] == 8)
        .await;
    drop(relay);
    for id in ["a", "b"] {
        stage
            .until_cache(id, |cache| cache["known_from"] == "routing")
            .await;
    }
    let worker = stage.ask(&asked).await;
    for _ in 0..3 {
        assert_eq!(stage.ask(&asked).await, worker);
    }
}

#[tokio::test]
async fn a_view_that_proves_wrong_is_asked_for_again() {
    let (stage, relay) = two_told().await;
    let asked = prompt('A', 8);
    relay.say(&view("a"), stored(&asked, 8));
    stage
        .until_cache("a", |cache| cache["device_blocks"] == 8)
        .await;
    let had = u32::try_from(8 * BLOCK).unwrap();
    stage.worker("a").cached.store(had, Ordering::SeqCst);
    for _ in 0..20 {
        assert_eq!(stage.ask(&asked).await, "a");
    }
    let before = relay.snapshots();

    // The engine forgets, and nobody is told.
    relay.keep_quiet(&view("a"), Change::Cleared(None));
    stage.worker("a").cached.store(0, Ordering::SeqCst);
    let mut asked_again = 0;
    while relay.snapshots() == before {
        stage.ask(&asked).await;
        asked_again += 1;
        assert!(asked_again < 100);
    }
    stage
        .until_cache("a", |cache| cache["device_blocks"] == 0)
        .await;
    let metrics = stage.metrics().await;
    assert!(
        metrics.contains("stator_processor_cache_resyncs_total{model=\"model\"} 1"),
        "{metrics}"
    );
    assert_eq!(relay.snapshots(), before + 1, "the other view is right");
}
