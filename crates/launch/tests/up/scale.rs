//! Workers that come and go while requests run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use stator_testkit::http::{post, send};
use stator_testkit::process::{self, Signal};
use stator_testkit::wait::{PAUSE, until};
use tokio::task::JoinHandle;

use crate::launcher::{CHAT, Launcher, chat};

/// Clients that ask again and again until they are told to stop, each one request at a time.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub(crate) fn start(launcher: &Launcher) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let client = || {
            let (stop, answered) = (stop.clone(), answered.clone());
            let api = launcher.api;
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let answer = send(api, post(CHAT, chat(20).to_string())).await;
                    assert_eq!(answer.status, 200, "{answer:?}");
                    assert_eq!(answer.json()["usage"]["completion_tokens"], 20);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let clients = (0..4).map(|_| client()).collect();
        Self {
            stop,
            answered,
            clients,
        }
    }

    /// Waits for an answer to a request that was sent after this call.
    pub(crate) async fn goes_on(&self) {
        let enough = self.answered.load(Ordering::Relaxed) + self.clients.len() + 1;
        while self.answered.load(Ordering::Relaxed) < enough {
            assert!(
                self.clients.iter().all(|c| !c.is_finished()),
                "a client failed"
            );
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Stops; fails if any request failed.
    pub(crate) async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("every request is answered");
        }
    }
}

#[tokio::test]
async fn workers_come_and_go_and_no_request_fails() {
    let launcher = Launcher::ready("--workers 1", "").await;
    let traffic = Traffic::start(&launcher);
    traffic.goes_on().await;
    for (counts, names) in [
        ("agg=3", ["processor", "agg-0", "agg-1", "agg-2"].as_slice()),
        ("agg=1", &["processor", "agg-0"]),
        ("agg=2", &["processor", "agg-0", "agg-1"]),
    ] {
        let output = launcher.command(&format!("scale {counts}")).await;
        assert!(output.status.success(), "{output:?}");
        assert_eq!(launcher.names().await, names, "{output:?}");
        traffic.goes_on().await;
    }
    traffic.end().await;
}

#[tokio::test]
async fn numbers_that_could_not_serve_are_refused_with_what_would() {
    let launcher = Launcher::ready("--workers 1", "").await;
    for (counts, because) in [
        ("agg=0", "nobody would serve: say agg=1"),
        ("decode=2", "say prefill=1"),
        ("prefill=2", "say decode=1"),
        ("agg=1 agg=2", "agg is named twice"),
        (
            "agg=1 --name other",
            "no topology named \"other\" runs, but \"default\"",
        ),
    ] {
        let output = launcher.command(&format!("scale {counts}")).await;
        assert_eq!(output.status.code(), Some(1), "{counts}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(because), "{counts}: {said}");
    }
    assert_eq!(launcher.names().await, ["processor", "agg-0"]);
}

#[tokio::test]
async fn a_removed_worker_leaves_no_engine_behind_where_engines_are_kept() {
    let launcher = Launcher::ready("--workers 2 --engine-keep", "").await;
    let engine = launcher.engine("agg-1");
    assert!(process::is_alive(engine));
    let output = launcher.command("scale agg=1").await;
    assert!(output.status.success(), "{output:?}");
    assert!(!process::is_alive(engine));

    // That of the one that stayed is kept for the next start.
    let kept = launcher.engine("agg-0");
    let output = launcher.command("down").await;
    assert!(output.status.success(), "{output:?}");
    assert!(process::is_alive(kept));
    process::signal(kept, Signal::SIGTERM);
    until("the kept engine has ended", || !process::is_alive(kept)).await;
}
