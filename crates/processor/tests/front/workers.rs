//! Workers come, go, fail and disagree.

use stator_common::Code;
use stator_common::card::{Card, File, Role};
use stator_processor::config::Config;
use stator_processor::pool::RouterMode;
use stator_testkit::http::{get, post, send, until};
use stator_testkit::worker::Worker;

use crate::answers::{completion, refuses, tokens};
use crate::support::{start, until_open};

#[tokio::test]
async fn a_model_without_a_worker_is_one_to_wait_for() {
    let processor = start(Config::default()).await;
    let nobody = send(processor.addr, get("/health")).await;
    assert_eq!(nobody.status, 503);
    assert_eq!(nobody.json()["reasons"][0], "no worker was found");
    let answered = send(processor.addr, completion()).await;
    assert_eq!(
        (answered.status, answered.error().as_str()),
        (503, "no worker was found that serves a model")
    );
    assert!(answered.headers.contains_key("retry-after"));

    let rename = |card: &mut Card| card.model.names = vec!["other".to_owned()];
    let _other = Worker::customized(&processor.discovery, "other", tokens(&[1]), rename).await;
    until_open(processor.addr, 1).await;
    assert_eq!(send(processor.addr, completion()).await.status, 404);

    let worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 2).await;
    let answered = send(processor.addr, completion()).await;
    assert_eq!(answered.status, 200, "{answered:?}");

    worker.stop().await;
    until(processor.addr, "/v1/models", |answered| {
        answered.json()["data"][1].is_null()
    })
    .await;
    let answered = send(processor.addr, completion()).await;
    assert_eq!(
        (answered.status, answered.error().as_str()),
        (503, "the model `model` has no worker at present")
    );
}

#[tokio::test]
async fn a_model_whose_only_worker_lost_its_connection_gives_503_with_retry_after() {
    let processor = start(Config::default()).await;
    let mut worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    worker.disconnect().await;
    until_open(processor.addr, 0).await;
    let answered = send(processor.addr, completion()).await;
    assert_eq!(answered.status, 503, "{answered:?}");
    assert_eq!(answered.error(), "no worker of this model is connected");
    assert!(answered.headers.contains_key("retry-after"));
    let health = send(processor.addr, get("/health")).await;
    assert_eq!(health.status, 503);
    assert_eq!(
        health.json()["reasons"][0],
        "model: no worker of this model is connected"
    );
}

#[tokio::test]
async fn a_failing_worker_is_still_asked_when_it_is_the_only_one() {
    let processor = start(Config::default()).await;
    let worker = Worker::start(&processor.discovery, "w", refuses(Code::EngineDead)).await;
    until_open(processor.addr, 1).await;
    for _ in 0..3 {
        assert_eq!(send(processor.addr, completion()).await.status, 503);
    }
    assert_eq!(worker.submitted(), 3);
}

#[tokio::test]
async fn a_worker_that_is_known_but_not_connected_gives_503_with_retry_after() {
    let processor = start(Config::default()).await;
    let _worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    // Nobody listens there: the card stays, the connection never comes.
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nowhere.local_addr().unwrap().to_string();
    drop(nowhere);
    let _absent = Worker::customized(&processor.discovery, "absent", tokens(&[1]), |card| {
        card.address = address;
        card.model.names = vec!["other".to_owned()];
    })
    .await;
    until(processor.addr, "/workers", |answered| {
        !answered.json()["unused"][0].is_null()
    })
    .await;
    let body = r#"{"model": "other", "prompt": [1], "max_tokens": 1}"#;
    let answered = send(processor.addr, post("/v1/completions", body)).await;
    assert_eq!(answered.status, 503, "{answered:?}");
    assert!(answered.headers.contains_key("retry-after"));
    assert!(answered.error().contains("still being loaded"));
}

#[tokio::test]
async fn an_attempt_that_fails_before_its_first_token_is_repeated_elsewhere() {
    for code in [
        Code::Draining,
        Code::EngineDead,
        Code::Overloaded,
        Code::Unavailable,
    ] {
        let processor = start(Config::default()).await;
        let bad = Worker::start(&processor.discovery, "bad", refuses(code)).await;
        let good = Worker::start(&processor.discovery, "good", tokens(&[1])).await;
        until_open(processor.addr, 2).await;
        for _ in 0..4 {
            let answered = send(processor.addr, completion()).await;
            assert_eq!(answered.status, 200, "{code:?} {answered:?}");
        }
        assert_eq!(good.submitted(), 4, "{code:?}");
        assert!(bad.submitted() > 0, "{code:?}");
        let retries = format!("retries_total{{model=\"model\"}} {}", bad.submitted());
        let metrics = send(processor.addr, get("/metrics")).await;
        assert!(metrics.text().contains(&retries), "{code:?}");
    }
}

#[tokio::test]
async fn a_request_at_fault_is_not_repeated() {
    let processor = start(Config::default()).await;
    let one = Worker::start(&processor.discovery, "one", refuses(Code::InvalidRequest)).await;
    let two = Worker::start(&processor.discovery, "two", refuses(Code::InvalidRequest)).await;
    until_open(processor.addr, 2).await;
    let answered = send(processor.addr, completion()).await;
    assert_eq!(
        (answered.status, answered.error().as_str()),
        (400, "refused by the test")
    );
    assert_eq!(one.submitted() + two.submitted(), 1);
}

#[tokio::test]
async fn when_all_refuse_the_last_reason_is_told() {
    let processor = start(Config::default()).await;
    let one = Worker::start(&processor.discovery, "one", refuses(Code::Overloaded)).await;
    let two = Worker::start(&processor.discovery, "two", refuses(Code::Overloaded)).await;
    until_open(processor.addr, 2).await;
    let answered = send(processor.addr, completion()).await;
    assert_eq!(
        (answered.status, answered.error().as_str()),
        (429, "refused by the test")
    );
    assert!(answered.headers.contains_key("retry-after"));
    assert_eq!((one.submitted(), two.submitted()), (1, 1));
}

#[tokio::test]
async fn a_worker_that_failed_is_avoided_for_a_while() {
    let processor = start(Config::default()).await;
    let bad = Worker::start(&processor.discovery, "bad", refuses(Code::EngineDead)).await;
    let _good = Worker::start(&processor.discovery, "good", tokens(&[1])).await;
    until_open(processor.addr, 2).await;
    while bad.submitted() == 0 {
        assert_eq!(send(processor.addr, completion()).await.status, 200);
    }
    let workers = send(processor.addr, get("/workers")).await.json();
    let targets = workers["models"][0]["targets"].as_array().unwrap();
    let bad = targets
        .iter()
        .find(|target| target["worker"] == "bad")
        .unwrap();
    assert_eq!(bad["availability"], "inhibited");
}

#[tokio::test]
async fn a_worker_whose_answers_nobody_could_read_is_refused() {
    let processor = start(Config::default()).await;
    let _worker = Worker::customized(&processor.discovery, "w", tokens(&[1]), |card| {
        card.model.reasoning_parser = Some("best".to_owned());
    })
    .await;
    let workers = until(processor.addr, "/workers", |answered| {
        !answered.json()["unused"][0].is_null()
    })
    .await;
    let refused = &workers.json()["unused"][0];
    let reason = refused["reason"].as_str().unwrap();
    assert!(
        reason.contains("no reasoning parser is named \"best\""),
        "{reason}"
    );
    assert_eq!(refused["passing"], false);
}

#[tokio::test]
async fn a_worker_that_disagrees_is_refused_until_the_others_have_gone() {
    let processor = start(Config::default()).await;
    let first = Worker::start(&processor.discovery, "first", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let other = Worker::customized(&processor.discovery, "other", tokens(&[2]), |card| {
        card.model.max_model_len = 64;
        card.model
            .files
            .insert("extra.json".to_owned(), File::of(b"x"));
    })
    .await;
    let workers = until(processor.addr, "/workers", |answered| {
        !answered.json()["unused"][0].is_null()
    })
    .await;
    let reason = workers.json()["unused"][0]["reason"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        reason.contains("file extra.json") && reason.contains("max_model_len (64, not 512)"),
        "{reason}"
    );
    let refused = send(processor.addr, get("/metrics")).await;
    assert!(refused.text().contains("workers_refused_total 1"));
    for _ in 0..4 {
        assert_eq!(send(processor.addr, completion()).await.status, 200);
    }
    assert_eq!((first.submitted(), other.submitted()), (4, 0));

    first.stop().await;
    until(processor.addr, "/v1/models/model", |answered| {
        answered.status == 200 && answered.json()["max_model_len"] == 64
    })
    .await;
    until_open(processor.addr, 1).await;
    assert_eq!(send(processor.addr, completion()).await.status, 200);
    assert_eq!(other.submitted(), 1);
}

#[tokio::test]
async fn round_robin_spreads_requests_over_workers_and_their_ranks() {
    let processor = start(Config {
        router_mode: RouterMode::RoundRobin,
        ..Config::default()
    })
    .await;
    let one = Worker::start(&processor.discovery, "one", tokens(&[1])).await;
    let ranked = Worker::customized(&processor.discovery, "two", tokens(&[1]), |card| {
        card.model.dp_size = 2;
    })
    .await;
    until_open(processor.addr, 3).await;
    for _ in 0..6 {
        assert_eq!(send(processor.addr, completion()).await.status, 200);
    }
    assert_eq!((one.submitted(), ranked.submitted()), (2, 4));
}

#[tokio::test]
async fn workers_of_other_namespaces_and_roles_are_not_used() {
    let config = Config {
        namespace: Some("mine".to_owned()),
        ..Config::default()
    };
    let processor = start(config).await;
    let _theirs = Worker::start(&processor.discovery, "theirs", tokens(&[1])).await;
    let _encode = Worker::customized(&processor.discovery, "encode", tokens(&[1]), |card| {
        card.endpoint.namespace = "mine".to_owned();
        card.role = Role::Encode;
    })
    .await;
    let mine = Worker::customized(&processor.discovery, "mine", tokens(&[1]), |card| {
        card.endpoint.namespace = "mine".to_owned();
    })
    .await;
    until_open(processor.addr, 1).await;
    let workers = send(processor.addr, get("/workers")).await.json();
    assert_eq!(workers["models"][0]["targets"][0]["worker"], "mine");
    assert_eq!(workers["models"][0]["targets"].as_array().unwrap().len(), 1);
    assert_eq!(mine.submitted(), 0);
}

#[tokio::test]
async fn a_tokenizer_that_cannot_be_built_is_told_and_does_not_stop_the_others() {
    let processor = start(Config::default()).await;
    let _broken = Worker::customized(&processor.discovery, "broken", tokens(&[1]), |card| {
        card.model.names = vec!["broken".to_owned()];
        card.model.files.clear();
    })
    .await;
    let _good = Worker::start(&processor.discovery, "good", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let health = until(processor.addr, "/health", |answered| {
        answered.text().contains("broken")
    })
    .await;
    assert_eq!(health.status, 200);
    assert!(health.text().contains("no tokenizer.json"), "{health:?}");
    // Waiting does not help, so nobody is told to.
    let asked = send(processor.addr, get("/v1/models/broken")).await;
    assert_eq!(asked.status, 500, "{asked:?}");
    assert!(asked.error().contains("no tokenizer.json"), "{asked:?}");
    assert!(!asked.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn the_system_port_tells_launchers_the_state_without_a_key() {
    let config = Config {
        system_port: 0,
        api_key: vec!["key".into()],
        ..Config::default()
    };
    let processor = start(config).await;
    let system = processor.system.unwrap();
    let before = send(system, get("/status")).await.json();
    assert_eq!(before["state"], "starting");
    assert_eq!(before["phase"], "no worker was found");
    let _worker = Worker::start(&processor.discovery, "w", tokens(&[1, 2])).await;
    until(system, "/status", |answered| {
        answered.json()["state"] == "ready"
    })
    .await;

    let mut request = completion();
    let key = "Bearer key".parse().unwrap();
    request.headers_mut().insert("authorization", key);
    assert_eq!(send(processor.addr, request).await.status, 200);
    let after = send(system, get("/status")).await.json();
    assert_eq!(after["models"][0], "model");
    assert_eq!(
        (
            after["running"].as_u64(),
            after["generated_tokens"].as_u64()
        ),
        (Some(0), Some(2))
    );
    assert_eq!(send(system, get("/v1/models")).await.status, 404);
}
