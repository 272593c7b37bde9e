//! A topology that comes, answers and goes.

use std::net::TcpListener;

use stator_testkit::http::{open, post, send};
use stator_testkit::ports;
use stator_testkit::process::{self, Signal};

use crate::launcher::{CHAT, Launcher, SLOW, UNHURRIED, chat, endless, until_gone};

/// Two aggregated workers.
const TWO: &str = "--workers 2";

#[tokio::test]
async fn a_topology_answers_is_shown_and_drains_on_ctrl_c() {
    let mut launcher = Launcher::ready(TWO, UNHURRIED).await;
    let shown = launcher.status("").await;
    for name in ["processor", "agg-0", "agg-1"] {
        let row = shown.lines().find(|line| line.contains(name));
        assert!(row.expect(name).contains(" ready"), "{shown}");
    }
    let descendants = launcher.descendants();
    // Two workers with an engine each, and the processor.
    assert!(descendants.len() >= 5, "{descendants:?}");

    let answered = launcher.ask(&chat(5)).await;
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_eq!(answered.json()["usage"]["completion_tokens"], 5);

    // One that runs when Ctrl-C comes gets its whole answer.
    let body = chat(300).to_string();
    let running = tokio::spawn(send(launcher.api, post(CHAT, body)));
    launcher.until_running().await;
    launcher.interrupt();
    let answered = running.await.expect("no panic");
    assert_eq!(answered.json()["usage"]["completion_tokens"], 300);
    let (status, printed) = launcher.ended().await;
    assert!(status.success(), "{status}:\n{printed}");
    assert!(printed.contains("draining"), "{printed}");

    // Nothing is left of it: no process, no entry, no one at the port.
    assert_eq!(
        descendants
            .iter()
            .filter(|pid| process::is_alive(**pid))
            .count(),
        0,
        "{printed}"
    );
    assert!(launcher.status("").await.starts_with("nothing runs"));
    TcpListener::bind(launcher.api).expect("the port is free");
}

#[tokio::test]
async fn a_second_ctrl_c_ends_at_once() {
    let mut launcher = Launcher::ready(TWO, SLOW).await;
    let descendants = launcher.descendants();
    let mut reading = open(launcher.api, CHAT, &endless()).await;
    assert_eq!(reading.status, 200);
    reading.next().await.expect("a first event");

    launcher.interrupt();
    launcher.until_printed("draining").await;
    assert!(descendants.iter().all(|pid| process::is_alive(*pid)));
    launcher.interrupt();
    let (status, printed) = launcher.ended().await;
    assert_eq!(status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("stator: killed what had not ended"),
        "{printed}"
    );
    until_gone(&descendants).await;
}

#[tokio::test]
async fn a_worker_that_cannot_start_is_named_and_ends_the_topology() {
    let mut launcher = Launcher::start(ports::free(), TWO, "--sim-fail-to-load");
    let (status, printed) = launcher.ended().await;
    assert_eq!(status.code(), Some(1), "{printed}");
    let named = |index| format!("stator: agg-{index} ended with status 1; its last lines");
    assert!(
        (0..2).any(|index| printed.contains(&named(index))),
        "{printed}"
    );
    assert!(launcher.status("").await.starts_with("nothing runs"));
}

#[tokio::test]
async fn a_worker_that_dies_later_is_named_and_started_again() {
    let mut launcher = Launcher::ready(TWO, "").await;
    let worker = launcher.child("agg-1").await;
    process::signal(worker, Signal::SIGKILL);
    launcher
        .until_printed("agg-1 was ended by SIGKILL; its last lines")
        .await;
    // The other one goes on.
    let answered = launcher.ask(&chat(5)).await;
    assert_eq!(answered.status, 200, "{answered:?}");
    launcher.until_printed("agg-1 is started again in 1s").await;
    launcher.until_state("agg-1", "ready").await;
    assert_ne!(launcher.child("agg-1").await, worker);
}

#[tokio::test]
async fn workers_that_speak_grpc_answer_and_one_may_die() {
    let mut launcher = Launcher::ready("--workers 2 --request-plane http", "").await;
    let answered = launcher.ask(&chat(5)).await;
    assert_eq!(answered.status, 200, "{answered:?}");
    process::signal(launcher.child("agg-1").await, Signal::SIGKILL);
    launcher.until_printed("agg-1 was ended by SIGKILL").await;
    for _ in 0..4 {
        let answered = launcher.ask(&chat(5)).await;
        assert_eq!(answered.status, 200, "{answered:?}");
    }
}

#[tokio::test]
async fn a_processor_that_dies_is_started_again_at_its_address() {
    let mut launcher = Launcher::ready(TWO, "").await;
    process::signal(launcher.child("processor").await, Signal::SIGKILL);
    launcher
        .until_printed("processor is started again in 1s")
        .await;
    launcher.until_state("processor", "ready").await;
    let answered = launcher.ask(&chat(5)).await;
    assert_eq!(answered.status, 200, "{answered:?}");
}

#[tokio::test]
async fn a_taken_port_is_told_at_once_and_leaves_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("a bound socket");
    let mut launcher = Launcher::start(addr.port(), TWO, "");
    let (status, printed) = launcher.ended().await;
    assert_eq!(status.code(), Some(1), "{printed}");
    let said = format!("stator: {addr} is taken");
    assert!(printed.contains(&said), "{printed}");
    assert!(
        !printed.contains("agg-0"),
        "no worker was started: {printed}"
    );
    assert!(launcher.status("").await.starts_with("nothing runs"));
}

#[tokio::test]
async fn down_drains_from_elsewhere_and_returns_when_all_is_gone() {
    let mut launcher = Launcher::ready(TWO, UNHURRIED).await;
    let descendants = launcher.descendants();
    let running = tokio::spawn(send(launcher.api, post(CHAT, chat(200).to_string())));
    launcher.until_running().await;
    let output = launcher.command("down").await;
    assert!(output.status.success(), "{output:?}");
    assert!(descendants.iter().all(|pid| !process::is_alive(*pid)));
    let answered = running.await.expect("no panic");
    assert_eq!(answered.json()["usage"]["completion_tokens"], 200);
    let (status, printed) = launcher.ended().await;
    assert!(status.success(), "{printed}");

    let output = launcher.command("down").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing runs"));
}

#[tokio::test]
async fn down_now_waits_for_no_request() {
    let mut launcher = Launcher::ready(TWO, SLOW).await;
    let descendants = launcher.descendants();
    let mut reading = open(launcher.api, CHAT, &endless()).await;
    reading.next().await.expect("a first event");
    let output = launcher.command("down --now").await;
    assert!(output.status.success(), "{output:?}");
    launcher.ended().await;
    until_gone(&descendants).await;
}

#[tokio::test]
async fn every_shape_answers() {
    for (shape, children) in [
        ("--router kv", 2),
        ("--workers 8 --router kv", 9),
        (
            "--prefill-workers 4 --decode-workers 1 --prefill-tp 1 --decode-tp 4",
            6,
        ),
        (
            "--prefill-workers 2 --decode-workers 1 --router kv --conditional-disagg auto",
            4,
        ),
        ("--data-parallel-size 2 --tp 2", 2),
    ] {
        let mut launcher = Launcher::ready(shape, "").await;
        assert_eq!(launcher.names().await.len(), children, "{shape}");
        let answered = launcher.ask(&chat(5)).await;
        assert_eq!(answered.status, 200, "{shape}: {answered:?}");
        launcher.interrupt();
        let (status, printed) = launcher.ended().await;
        assert!(status.success(), "{shape}: {printed}");
    }
}
