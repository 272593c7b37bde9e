//! Processors in front of the same workers, who tell each other what they have booked.

use std::net::SocketAddr;

use http::HeaderValue;
use serde_json::Value;
use stator_common::discovery::Discovery;
use stator_common::discovery::kubernetes::Kubernetes;
use stator_common::settings::KubernetesSettings;
use stator_processor::Processor;
use stator_processor::config::Config;
use stator_processor::pool::RouterMode;
use stator_testkit::http::{Answered, get, post, send, until};
use stator_testkit::kubernetes::Kubernetes as Cluster;
use stator_testkit::worker::{Attempt, Worker};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::stage::{COMPLETIONS, body};
use crate::support::{self, until_open};

fn config() -> Config {
    Config {
        router_mode: RouterMode::LeastLoaded,
        ..Config::default()
    }
}

/// Adds a worker that answers nothing by itself.
async fn silent(discovery: &impl Discovery, id: &str) -> (Worker, UnboundedReceiver<Attempt>) {
    let (sender, attempts) = mpsc::unbounded_channel();
    let script = move |attempt: Attempt| drop(sender.send(attempt));
    (Worker::start(discovery, id, script).await, attempts)
}

fn ask(addr: SocketAddr) {
    tokio::spawn(send(addr, post(COMPLETIONS, body("hello").to_string())));
}

/// Asks for an answer of that worker.
fn ask_of(addr: SocketAddr, worker: &'static str) {
    let mut request = post(COMPLETIONS, body("hello").to_string());
    let worker = HeaderValue::from_static(worker);
    request.headers_mut().insert("x-stator-worker", worker);
    tokio::spawn(send(addr, request));
}

/// Returns what a processor knows of others: how many it hears, and requests that they have booked on all workers.
fn known(answered: &Answered) -> (u64, u64) {
    let known = answered.json();
    let targets = known["models"][0]["targets"].as_array().cloned();
    let booked = |target: &Value| target["booked_by_others"]["requests"].as_u64();
    let sum = targets.iter().flatten().filter_map(booked).sum();
    (known["processors_heard"].as_u64().unwrap(), sum)
}

/// Waits until a processor knows so much of others.
async fn until_known(addr: SocketAddr, processors: u64, requests: u64) {
    until(addr, "/workers", |answered| {
        known(answered) == (processors, requests)
    })
    .await;
}

#[tokio::test]
async fn what_one_has_booked_is_weighed_by_the_other_until_it_is_gone() {
    let one = support::start(config()).await;
    let two = support::start_in(config(), &one.discovery).await;
    let (_a, mut at_a) = silent(&one.discovery, "a").await;
    let (_b, mut at_b) = silent(&one.discovery, "b").await;
    until_open(one.addr, 2).await;
    until_open(two.addr, 2).await;
    let mut of_one = Vec::new();
    for _ in 0..4 {
        ask_of(one.addr, "a");
        of_one.push(at_a.recv().await.unwrap());
    }
    until_known(two.addr, 1, 4).await;
    // By its own books the second processor would give each worker a half of these.
    let mut of_two = Vec::new();
    for _ in 0..4 {
        ask(two.addr);
        of_two.push(tokio::select! {
            Some(attempt) = at_b.recv() => attempt,
            Some(_) = at_a.recv() => panic!("it went to the worker that has more to do"),
        });
    }
    until_known(one.addr, 1, 4).await;

    // Whoever dies has booked nothing any more, and is another one when it comes again.
    two.task.abort();
    until_known(one.addr, 0, 0).await;
    let again = support::start_in(config(), &one.discovery).await;
    until_open(again.addr, 2).await;
    until_known(one.addr, 1, 0).await;
    until_known(again.addr, 1, 4).await;
    of_one[0].send(stator_common::plane::delta::failed(
        0,
        stator_common::Code::InvalidRequest,
        "enough",
    ));
    until_known(again.addr, 1, 3).await;
}

/// The cluster as a process in a pod of its own sees it.
async fn pod(cluster: &Cluster, name: &str) -> Kubernetes {
    cluster.run_pod(name, &["only"]);
    let settings = KubernetesSettings {
        config: Some(cluster.config()),
        pod: Some(name.to_owned()),
        ..KubernetesSettings::default()
    };
    Kubernetes::new(&settings).await.unwrap()
}

#[tokio::test]
async fn processors_in_pods_weigh_what_the_other_has_booked_until_its_pod_is_gone() {
    let cluster = Cluster::start().await;
    let one = support::start_in(config(), &pod(&cluster, "one").await).await;
    let two = support::start_in(config(), &pod(&cluster, "two").await).await;
    let (_worker, mut attempts) = silent(&pod(&cluster, "worker").await, "a").await;
    for addr in [one.addr, two.addr] {
        until_open(addr, 1).await;
    }
    ask(one.addr);
    let _attempt = attempts.recv().await.unwrap();
    until_known(two.addr, 1, 1).await;
    until_known(one.addr, 1, 0).await;
    cluster.delete("two");
    until_known(one.addr, 0, 0).await;
}

#[tokio::test]
async fn whoever_is_told_to_keep_to_itself_neither_tells_nor_hears() {
    let one = support::start(config()).await;
    let alone = Config {
        router_replica_sync: false,
        ..config()
    };
    let two = support::start_in(alone, &one.discovery).await;
    let three = support::start_in(config(), &one.discovery).await;
    let (_worker, mut attempts) = silent(&one.discovery, "a").await;
    for addr in [one.addr, two.addr, three.addr] {
        until_open(addr, 1).await;
    }
    // Each has something to tell. The two that tell have told each other all when they know as much as this.
    for addr in [two.addr, one.addr, three.addr] {
        ask(addr);
    }
    let _attempts = [
        attempts.recv().await.unwrap(),
        attempts.recv().await.unwrap(),
        attempts.recv().await.unwrap(),
    ];
    until_known(one.addr, 1, 1).await;
    until_known(three.addr, 1, 1).await;
    assert_eq!(one.discovery.peers().await.unwrap().len(), 2);
    let answered = send(two.addr, get("/workers")).await;
    assert_eq!(known(&answered), (0, 0));
}

#[tokio::test]
async fn an_address_that_nobody_can_be_told_is_refused() {
    let refused = Processor::bind(Config {
        http_port: 0,
        router_sync_host: "0.0.0.0".to_owned(),
        ..config()
    });
    let error = refused.await.err().unwrap().to_string();
    assert!(error.contains("router_sync_host"), "{error}");
}
