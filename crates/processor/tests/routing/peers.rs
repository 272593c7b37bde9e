//! Processors in front of the same workers, who tell each other what they have booked.

use std::net::SocketAddr;

use serde_json::Value;
use stator_common::discovery::Discovery;
use stator_common::discovery::kubernetes::Kubernetes;
use stator_common::settings::KubernetesSettings;
use stator_processor::Processor;
use stator_processor::config::Config;
use stator_processor::pool::RouterMode;
use stator_testkit::http::{post, send, until};
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

/// Waits for what a processor knows of others: how many it hears, and requests that they have booked on all workers.
async fn until_known(addr: SocketAddr, processors: u64, requests: u64) {
    until(addr, "/workers", |answered| {
        let known = answered.json();
        let targets = known["models"][0]["targets"].as_array().cloned();
        let booked = |target: &Value| target["booked_by_others"]["requests"].as_u64();
        let sum: u64 = targets.iter().flatten().filter_map(booked).sum();
        known["processors_heard"] == processors && sum == requests
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
    ask(one.addr);
    let (first, first_is_at_a) = tokio::select! {
        Some(first) = at_a.recv() => (first, true),
        Some(first) = at_b.recv() => (first, false),
    };
    until_known(two.addr, 1, 1).await;
    // To the second processor both would be idle; it takes the one that is.
    ask(two.addr);
    let other = if first_is_at_a { &mut at_b } else { &mut at_a };
    let _second = other.recv().await.unwrap();
    until_known(one.addr, 1, 1).await;

    // Whoever dies has booked nothing any more, and is another one when it comes again.
    two.task.abort();
    until_known(one.addr, 0, 0).await;
    let again = support::start_in(config(), &one.discovery).await;
    until_open(again.addr, 2).await;
    until_known(one.addr, 1, 0).await;
    until_known(again.addr, 1, 1).await;
    first.send(stator_common::plane::delta::failed(
        0,
        stator_common::Code::InvalidRequest,
        "enough",
    ));
    until_known(again.addr, 1, 0).await;
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
    ask(one.addr);
    let _attempt = attempts.recv().await.unwrap();
    until_known(three.addr, 1, 1).await;
    until_known(two.addr, 0, 0).await;
    until_known(one.addr, 1, 0).await;
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
