//! Discovery through the pods of a cluster whose API server is played, killed, restarted and made forget meanwhile.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use stator_common::{
    Code,
    card::Relay,
    discovery::{Discovery, DiscoveryError, Peer, kubernetes::Kubernetes},
    settings::KubernetesSettings,
};
use stator_testkit::{
    kubernetes::Kubernetes as Server,
    wait::{PATIENCE, PAUSE},
};

use support::{card, gone, next, put};

fn settings(server: &Server, pod: &str) -> KubernetesSettings {
    KubernetesSettings {
        config: Some(server.config()),
        pod: Some(pod.to_owned()),
        ..KubernetesSettings::default()
    }
}

/// The cluster as a worker in a pod sees it, or a processor.
async fn place(server: &Server, pod: &str) -> Kubernetes {
    Kubernetes::new(&settings(server, pod)).await.unwrap()
}

async fn place_in(server: &Server, pod: &str, container: &str) -> Kubernetes {
    let settings = KubernetesSettings {
        container: Some(container.to_owned()),
        ..settings(server, pod)
    };
    Kubernetes::new(&settings).await.unwrap()
}

fn annotation(server: &Server, pod: &str, worker: &str) -> Option<String> {
    let pod = server.pod(pod);
    let card = &pod["metadata"]["annotations"][format!("stator.dev/card.{worker}")];
    card.as_str().map(str::to_owned)
}

fn refusal<T>(result: Result<T, DiscoveryError>) -> String {
    let Err(error) = result else {
        panic!("it was not refused")
    };
    assert_eq!(error.code(), Code::Unavailable);
    error.to_string()
}

fn peer(name: &str) -> Peer {
    Peer {
        name: name.to_owned(),
        host: "here".to_owned(),
        events: Relay {
            endpoint: "tcp://127.0.0.1:1".to_owned(),
            snapshot_endpoint: "tcp://127.0.0.1:2".to_owned(),
        },
    }
}

/// Waits until these processors are there and no others.
async fn until_peers(place: &Kubernetes, names: &[&str]) {
    let wanted: Vec<_> = names.iter().map(|name| peer(name)).collect();
    let wait = async {
        while place.peers().await.unwrap() != wanted {
            tokio::time::sleep(PAUSE).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "{:?}", place.peers().await);
}

/// Registers a worker whose process then dies without a word.
async fn register_and_die(server: &Server, pod: &str, worker: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (settings, card) = (settings(server, pod), card(worker));
    let registered = runtime.spawn(async move {
        let place = Kubernetes::new(&settings).await.unwrap();
        place.register(card).await.unwrap()
    });
    std::mem::forget(registered.await.unwrap());
    runtime.shutdown_background();
}

#[test]
fn the_pods_of_these_tests_have_the_fields_of_real_ones_and_no_others() {
    let text = include_str!("../../testkit/golden/kubernetes/pod.json");
    let written: Value = serde_json::from_str(text).unwrap();
    let read: Pod = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_value(read).unwrap(), written);
}

#[tokio::test]
async fn watchers_learn_of_workers_that_were_there_come_and_leave() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.run_pod("two", &["worker"]);
    let first = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let _second = place(&server, "two")
        .await
        .register(card("b"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(annotation(&server, "one", "a"), None);
}

#[tokio::test]
async fn two_workers_of_one_container_have_a_card_each() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    let mut watch = place(&server, "").await.watch().await.unwrap();
    let first = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let _second = place(&server, "one")
        .await
        .register(card("b"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
    assert!(annotation(&server, "one", "b").is_some());
}

#[tokio::test]
async fn a_card_dies_with_its_container_and_not_with_a_neighbour() {
    let server = Server::start().await;
    server.run_pod("one", &["left", "right"]);
    let left = place_in(&server, "one", "left").await;
    let right = place_in(&server, "one", "right").await;
    let _left = left.register(card("a")).await.unwrap();
    let _right = right.register(card("b")).await.unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    let there = [next(&mut watch).await, next(&mut watch).await];
    assert_eq!(there, [put("a"), put("b")]);
    server.stop_container("one", "left");
    assert_eq!(next(&mut watch).await, gone("a"));
    server.set_ready("one", "right", false);
    assert_eq!(next(&mut watch).await, gone("b"));
    server.set_ready("one", "right", true);
    assert_eq!(next(&mut watch).await, put("b"));
}

#[tokio::test]
async fn the_card_of_an_earlier_life_of_a_container_does_not_count_and_is_removed_by_the_next() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    register_and_die(&server, "one", "a").await;
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    // Nobody sees it stopped: the kubelet may tell of both at once.
    server.start_container("one", "worker");
    assert_eq!(next(&mut watch).await, gone("a"));
    assert!(annotation(&server, "one", "a").is_some());
    let _next = place(&server, "one")
        .await
        .register(card("b"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    assert_eq!(annotation(&server, "one", "a"), None);
}

#[tokio::test]
async fn a_worker_that_the_kubelet_told_of_too_late_is_known_under_the_new_life_of_its_container() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    // What is told is the life before.
    let _registration = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    server.start_container("one", "worker");
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("a"));
}

#[tokio::test]
async fn a_worker_registers_when_its_container_is_told_of() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.stop_container("one", "worker");
    let place = place(&server, "one").await;
    let registering = tokio::spawn(async move { place.register(card("a")).await });
    let mut watch = self::place(&server, "").await.watch().await.unwrap();
    server.start_container("one", "worker");
    assert_eq!(next(&mut watch).await, put("a"));
    let _registration = registering.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_card_of_a_dead_process_in_a_living_container_is_removed_by_a_neighbour() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    register_and_die(&server, "one", "a").await;
    // As if another process had written it, which is no more.
    let mut entry: Value = serde_json::from_str(&annotation(&server, "one", "a").unwrap()).unwrap();
    entry["owner"]["start"] = 1.into();
    server.edit("one", |pod| {
        pod["metadata"]["annotations"]["stator.dev/card.a"] = entry.to_string().into();
    });
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let _neighbour = place(&server, "one")
        .await
        .register(card("b"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("b"));
}

#[tokio::test]
async fn a_pod_that_is_being_deleted_has_no_workers() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.run_pod("two", &["worker"]);
    let _one = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    register_and_die(&server, "two", "b").await;
    let mut watch = place(&server, "").await.watch().await.unwrap();
    let there = [next(&mut watch).await, next(&mut watch).await];
    assert_eq!(there, [put("a"), put("b")]);
    server.begin_delete("one");
    assert_eq!(next(&mut watch).await, gone("a"));
    server.delete("two");
    assert_eq!(next(&mut watch).await, gone("b"));
}

#[tokio::test]
async fn a_card_or_label_that_somebody_removes_is_written_again() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    let _registration = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    server.edit("one", |pod| {
        let annotations = pod["metadata"]["annotations"].as_object_mut().unwrap();
        annotations.remove("stator.dev/card.a").unwrap();
    });
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("a"));
    server.edit("one", |pod| {
        let labels = pod["metadata"]["labels"].as_object_mut().unwrap();
        labels.remove("stator.dev/worker").unwrap();
    });
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("a"));
}

#[tokio::test]
async fn a_pod_is_written_to_once_whatever_else_happens_to_it() {
    let server = Server::start().await;
    server.run_pod("one", &["left", "right"]);
    let left = place_in(&server, "one", "left").await;
    let _registration = left.register(card("a")).await.unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    for _ in 0..3 {
        server.stop_container("one", "right");
        server.start_container("one", "right");
    }
    // The worker has seen all that when it has seen this.
    server.edit("one", |pod| {
        let annotations = pod["metadata"]["annotations"].as_object_mut().unwrap();
        annotations.remove("stator.dev/card.a").unwrap();
    });
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("a"));
    assert_eq!(server.writes(), 2);
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_from_where_it_was() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.run_pod("two", &["worker"]);
    let _one = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let lists = server.lists();
    server.end_watches();
    register_and_die(&server, "two", "b").await;
    server.end_watches();
    assert_eq!(next(&mut watch).await, put("b"));
    server.delete("two");
    assert_eq!(next(&mut watch).await, gone("b"));
    // That of the second worker for its own pod.
    assert_eq!(server.lists(), lists + 1);
}

#[tokio::test]
async fn history_that_the_server_forgot_is_not_needed() {
    let mut server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.run_pod("two", &["worker"]);
    let _one = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    register_and_die(&server, "two", "b").await;
    let mut watch = place(&server, "").await.watch().await.unwrap();
    let there = [next(&mut watch).await, next(&mut watch).await];
    assert_eq!(there, [put("a"), put("b")]);
    server.forget();
    let third = async {
        server.run_pod("three", &["worker"]);
        place(&server, "three").await.register(card("c")).await
    };
    let _three = third.await.unwrap();
    assert_eq!(next(&mut watch).await, put("c"));
    // What happens while nobody watches, and is forgotten before anybody does.
    server.kill().await;
    server.delete("two");
    server.forget();
    server.restart().await;
    assert_eq!(next(&mut watch).await, gone("b"));
}

#[tokio::test]
async fn while_the_server_is_away_nothing_changes_and_afterwards_everything_goes_on() {
    let mut server = Server::start().await;
    server.run_pod("one", &["worker"]);
    server.run_pod("two", &["worker"]);
    let first = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    server.kill().await;
    let silence = tokio::time::timeout(Duration::from_secs(5), watch.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    server.restart().await;
    let _second = place(&server, "two")
        .await
        .register(card("b"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    // Not forgotten: it is there to leave.
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
}

#[tokio::test]
async fn a_processor_that_starts_before_the_server_waits_for_it() {
    let mut server = Server::start().await;
    server.run_pod("one", &["worker"]);
    register_and_die(&server, "one", "a").await;
    server.kill().await;
    let mut watch = place(&server, "").await.watch().await.unwrap();
    server.restart().await;
    assert_eq!(next(&mut watch).await, put("a"));
}

#[tokio::test]
async fn a_role_that_lacks_a_verb_is_told_which() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    let place = place(&server, "one").await;
    place.check_register().await.unwrap();
    assert_eq!(server.writes(), 0);
    server.forbid(&["patch"]);
    for said in [
        refusal(place.check_register().await),
        refusal(place.register(card("a")).await),
    ] {
        assert!(said.contains("'patch' on pods"), "{said}");
    }
    server.forbid(&["watch"]);
    for said in [
        refusal(place.check_register().await),
        refusal(place.watch().await),
    ] {
        assert!(said.contains("'watch' on pods"), "{said}");
    }
    server.forbid(&["list"]);
    for said in [
        refusal(place.check_register().await),
        refusal(place.register(card("a")).await),
        refusal(place.watch().await),
    ] {
        assert!(
            said.contains("'list' on pods") && said.contains("cannot list"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_worker_that_cannot_tell_where_it_is_is_told_what_to_set() {
    let server = Server::start().await;
    server.run_pod("one", &["left", "right"]);
    let of = |change: &dyn Fn(&mut KubernetesSettings)| {
        let mut settings = settings(&server, "one");
        change(&mut settings);
        async move { Kubernetes::new(&settings).await.unwrap() }
    };
    let nowhere = of(&|settings| settings.pod = None).await;
    let elsewhere = of(&|settings| settings.pod = Some("two".to_owned())).await;
    let several = of(&|_| {}).await;
    let unknown = of(&|settings| settings.container = Some("top".to_owned())).await;
    for (place, said) in [
        (nowhere, "POD_NAME"),
        (elsewhere, "no pod 'two'"),
        (several, "left, right: set --kubernetes-container"),
        (unknown, "no container 'top'"),
    ] {
        let early = refusal(place.check_register().await);
        assert!(early.contains(said), "{early}");
        let late = refusal(place.register(card("a")).await);
        assert!(late.contains(said), "{late}");
    }
    let another = of(&|settings| {
        settings.container = Some("left".to_owned());
        settings.pod_uid = Some("another".to_owned());
    });
    let said = refusal(another.await.register(card("a")).await);
    assert!(said.contains("--kubernetes-pod-uid"), "{said}");
    assert_eq!(server.writes(), 0);
}

#[tokio::test]
async fn cards_that_a_pod_cannot_hold_are_refused() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    let place = place(&server, "one").await;
    let mut large = card("a");
    large.model.names = vec!["m".repeat(300_000)];
    let said = refusal(place.register(large).await);
    assert!(said.contains("262144 bytes"), "{said}");
    for name in ["a".repeat(60), "a/b".to_owned(), "a-".to_owned()] {
        let Err(error) = place.register(card(&name)).await else {
            panic!("registered {name}")
        };
        assert!(matches!(error, DiscoveryError::Name(_)), "{error}");
    }
}

#[tokio::test]
async fn annotations_that_are_no_cards_are_passed_over() {
    let server = Server::start().await;
    server.run_pod("one", &["worker"]);
    let _registration = place(&server, "one")
        .await
        .register(card("a"))
        .await
        .unwrap();
    server.edit("one", |pod| {
        let card = pod["metadata"]["annotations"]["stator.dev/card.a"].clone();
        pod["metadata"]["annotations"]["stator.dev/card.b"] = card;
        pod["metadata"]["annotations"]["stator.dev/card.c"] = "{}".into();
    });
    let mut watch = place(&server, "").await.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    server.run_pod("two", &["worker"]);
    let _second = place(&server, "two")
        .await
        .register(card("d"))
        .await
        .unwrap();
    assert_eq!(next(&mut watch).await, put("d"));
}

#[tokio::test]
async fn a_file_that_is_not_there_is_named() {
    let settings = KubernetesSettings {
        config: Some("/nowhere/config".into()),
        ..KubernetesSettings::default()
    };
    let error = Kubernetes::new(&settings).await.err().unwrap().to_string();
    assert!(
        error.contains("kubernetes_config /nowhere/config"),
        "{error}"
    );
}

#[tokio::test]
async fn processors_find_each_other_until_they_leave() {
    let server = Server::start().await;
    server.run_pod("one", &["processor"]);
    server.run_pod("two", &["processor"]);
    let [one, two] = [place(&server, "one").await, place(&server, "two").await];
    let first = one.join(peer("a")).await.unwrap();
    assert_eq!(one.peers().await.unwrap(), [peer("a")]);
    let _second = two.join(peer("b")).await.unwrap();
    until_peers(&one, &["a", "b"]).await;
    until_peers(&two, &["a", "b"]).await;
    drop(first);
    until_peers(&two, &["b"]).await;
    let annotations = &server.pod("one")["metadata"]["annotations"];
    assert_eq!(annotations["stator.dev/processor.a"], Value::Null);
}

#[tokio::test]
async fn processors_are_listed_once_however_often_they_are_asked_for() {
    let server = Server::start().await;
    server.run_pod("one", &["processor"]);
    let outside = place(&server, "").await;
    outside.peers().await.unwrap();
    let lists = server.lists();
    let _registration = place(&server, "one").await.join(peer("a")).await.unwrap();
    until_peers(&outside, &["a"]).await;
    outside.peers().await.unwrap();
    // That of the processor for its own pod.
    assert_eq!(server.lists(), lists + 1);
}

#[tokio::test]
async fn a_processor_counts_until_its_container_ends_though_it_takes_nothing_more() {
    let server = Server::start().await;
    server.run_pod("one", &["processor"]);
    server.run_pod("two", &["processor"]);
    let _one = place(&server, "one").await.join(peer("a")).await.unwrap();
    let _two = place(&server, "two").await.join(peer("b")).await.unwrap();
    let watching = place(&server, "").await;
    until_peers(&watching, &["a", "b"]).await;
    server.set_ready("one", "processor", false);
    server.begin_delete("one");
    // Later than both.
    server.stop_container("two", "processor");
    until_peers(&watching, &["a"]).await;
    server.delete("one");
    until_peers(&watching, &[]).await;
}

#[tokio::test]
async fn a_processor_and_a_worker_of_one_container_leave_each_other_alone() {
    let server = Server::start().await;
    server.run_pod("one", &["both"]);
    let place = place(&server, "one").await;
    let worker = place.register(card("a")).await.unwrap();
    let mut watch = place.watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let _processor = place.join(peer("a")).await.unwrap();
    until_peers(&place, &["a"]).await;
    drop(worker);
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(place.peers().await.unwrap(), [peer("a")]);
}

#[tokio::test]
async fn while_the_server_is_away_the_processors_that_are_known_stay() {
    let mut server = Server::start().await;
    server.run_pod("one", &["processor"]);
    let _one = place(&server, "one").await.join(peer("a")).await.unwrap();
    let watching = place(&server, "").await;
    until_peers(&watching, &["a"]).await;
    server.kill().await;
    assert_eq!(watching.peers().await.unwrap(), [peer("a")]);
    server.delete("one");
    server.forget();
    server.restart().await;
    until_peers(&watching, &[]).await;
}

#[tokio::test]
async fn a_processor_that_cannot_be_found_is_told_what_to_set() {
    let server = Server::start().await;
    server.run_pod("one", &["processor"]);
    let settings = KubernetesSettings {
        pod: None,
        ..settings(&server, "one")
    };
    let nowhere = Kubernetes::new(&settings).await.unwrap();
    let said = refusal(nowhere.join(peer("a")).await);
    assert!(
        said.contains("POD_NAME") && said.contains("processor"),
        "{said}"
    );
    let place = place(&server, "one").await;
    server.forbid(&["patch"]);
    let said = refusal(place.join(peer("a")).await);
    assert!(said.contains("'patch' on pods"), "{said}");
    server.forbid(&["watch"]);
    let said = refusal(place.peers().await);
    assert!(said.contains("'watch' on pods"), "{said}");
    // Nothing was given up for ever.
    server.forbid(&[]);
    let _registration = place.join(peer("a")).await.unwrap();
    until_peers(&place, &["a"]).await;
}
