//! Who is let in, and what strangers are told.

use http::Request;
use http_body_util::Full;
use stator_processor::config::Config;
use stator_testkit::http::{get, post, send, until};
use stator_testkit::worker::Worker;

use crate::answers::tokens;
use crate::support::{start, until_open};

fn with_keys() -> Config {
    Config {
        api_key: vec!["right".into(), "also-right".into()],
        ..Config::default()
    }
}

#[tokio::test]
async fn only_the_bearer_of_a_key_is_served() {
    let processor = start(with_keys()).await;
    let ask = |key: Option<&str>| {
        let mut request = get("/v1/models");
        if let Some(key) = key {
            request
                .headers_mut()
                .insert("authorization", key.parse().unwrap());
        }
        send(processor.addr, request)
    };
    for refused in [
        None,
        Some("Bearer wrong"),
        Some("right"),
        Some("Basic right"),
    ] {
        let answered = ask(refused).await;
        assert_eq!(answered.status, 401, "{refused:?}");
        assert!(answered.error().contains("API key") || answered.error().contains("Bearer"));
    }
    assert_eq!(ask(Some("Bearer right")).await.status, 200);
    assert_eq!(ask(Some("Bearer also-right")).await.status, 200);
}

#[tokio::test]
async fn probes_need_no_key_and_scrapers_do_unless_told() {
    let closed = start(with_keys()).await;
    let open = start(Config {
        metrics_auth: false,
        ..with_keys()
    })
    .await;
    for (processor, metrics) in [(&open, 200), (&closed, 401)] {
        assert_eq!(send(processor.addr, get("/live")).await.status, 200);
        assert_eq!(send(processor.addr, get("/health")).await.status, 503);
        assert_eq!(send(processor.addr, get("/metrics")).await.status, metrics);
        assert_eq!(send(processor.addr, get("/workers")).await.status, metrics);
    }
    // An unknown path tells a stranger nothing about what exists.
    assert_eq!(send(open.addr, get("/nothing")).await.status, 401);
}

#[tokio::test]
async fn what_is_not_served_is_refused_in_openais_words() {
    let processor = start(Config::default()).await;
    let _worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let unknown = send(processor.addr, get("/v1/nothing")).await;
    assert_eq!(
        (unknown.status, unknown.error().as_str()),
        (404, "GET /v1/nothing does not exist")
    );
    let wrong = send(processor.addr, post("/health", "")).await;
    assert_eq!(
        (wrong.status, wrong.error().as_str()),
        (405, "POST is not allowed at /health")
    );
    let bad = send(processor.addr, get("/v1/models/%ff")).await;
    assert_eq!(bad.status, 400, "{bad:?}");
    bad.error();
    assert_eq!(wrong.headers["allow"], "GET,HEAD");
    let model = send(processor.addr, get("/v1/models/nobody")).await;
    assert_eq!(
        (model.status, model.error().as_str()),
        (404, "the model `nobody` does not exist")
    );
    assert_eq!(model.json()["error"]["param"], "model");
}

#[tokio::test]
async fn every_answer_carries_the_requests_id() {
    let processor = start(Config::default()).await;
    let mut request = get("/live");
    request
        .headers_mut()
        .insert("x-request-id", "mine-7".parse().unwrap());
    assert_eq!(
        send(processor.addr, request).await.headers["x-request-id"],
        "mine-7"
    );
    let made = send(processor.addr, get("/nothing")).await;
    assert_eq!(made.headers["x-request-id"].len(), 32);
}

#[tokio::test]
async fn a_body_beyond_the_limit_gets_413_whether_announced_or_not() {
    let processor = start(Config {
        max_body_bytes: 1000,
        ..Config::default()
    })
    .await;
    let announced = send(processor.addr, post("/v1/completions", vec![b' '; 1001])).await;
    assert_eq!(announced.status, 413);
    assert_eq!(announced.error(), "the body is larger than 1000 bytes");

    let parts = "x".repeat(600);
    let chunk = format!("{:x}\r\n{parts}\r\n", parts.len());
    let head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = crate::connections::raw(processor.addr, &format!("{head}{chunk}{chunk}")).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let processor = start(Config::default()).await;
    let _worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let list = send(processor.addr, get("/v1/models")).await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(ids, ["model", "org/alias"]);
    let one = send(processor.addr, get("/v1/models/org/alias"))
        .await
        .json();
    assert_eq!(one["max_model_len"], 512);
    assert_eq!(one["parent"], "model");
    assert_eq!(one["object"], "model");
}

#[tokio::test]
async fn what_happened_is_counted() {
    let processor = start(Config::default()).await;
    let _worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let head = Request::head("/live")
        .header("host", "test")
        .body(Full::default())
        .unwrap();
    assert_eq!(send(processor.addr, head).await.status, 200);
    send(processor.addr, get("/v1/models/nobody")).await;
    for line in [
        "http_requests_total{route=\"/live\",status=\"200\"} 1",
        "http_requests_total{route=\"/v1/models/{model}\",status=\"404\"} 1",
        "worker_up{model=\"model\",worker=\"w\",dp_rank=\"\"} 1",
        "model_ready{model=\"model\"} 1",
    ] {
        until(processor.addr, "/metrics", |answered| {
            answered.text().contains(line)
        })
        .await;
    }
}
