//! `stator up` on simulated engines, as a person uses it: the built binaries, signals, and what is printed.
//!
//! Cargo builds the launcher for this test, but not what the launcher starts: that must lie beside it
//! (`cargo build --workspace --bins`, which `make test` does first).

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use stator_testkit::http::{Answered, open, post, send};
use stator_testkit::process::{self, Signal};
use stator_testkit::wait::until;
use stator_testkit::{model, ports};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

const CHAT: &str = "/v1/chat/completions";

/// Longest wait for the end of a launcher that is not given time to drain: far below [`GRACE`].
const AT_ONCE: Duration = Duration::from_secs(30);
/// Given to every drain, so that one that is cut short shows.
const GRACE: &str = "200s";

/// An engine that can be watched at work.
const UNHURRIED: &str = "--sim-speedup 0.4";
/// An engine that takes half a minute for [`endless`].
const SLOW: &str = "--sim-speedup 0.1";

/// A launcher with its own state folder. Dropping it kills it, and the launcher's children end with it.
struct Launcher {
    process: Child,
    printed: Printed,
    readers: [JoinHandle<()>; 2],
    api: SocketAddr,
    state: tempfile::TempDir,
    _model: tempfile::TempDir,
}

/// What the launcher printed so far, of both streams.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<String>>);

impl Printed {
    fn text(&self) -> String {
        self.0.lock().expect("no reader panics").clone()
    }

    fn follow(&self, stream: impl AsyncRead + Send + Unpin + 'static) -> JoinHandle<()> {
        let printed = self.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stream).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let mut text = printed.0.lock().expect("no reader panics");
                text.push_str(&line);
                text.push('\n');
            }
        })
    }
}

/// Returns the launcher's command.
///
/// # Panics
/// If a binary that it starts was not built.
fn stator() -> Command {
    let stator = Path::new(env!("CARGO_BIN_EXE_stator"));
    for name in ["stator-processor", "stator-agg", "stator-sim"] {
        assert!(
            stator.with_file_name(name).exists(),
            "{name} is not beside {}: run `cargo build --workspace --bins`",
            stator.display()
        );
    }
    let mut command = Command::new(stator);
    command.env_remove("STATOR_API_KEY").stdin(Stdio::null());
    command
}

impl Launcher {
    /// Starts two workers.
    fn start(http_port: u16, engine_flags: &str) -> Self {
        let state = tempfile::tempdir().expect("temporary folder");
        let model = model::folder();
        let mut process = stator()
            .args(["up", "--workers", "2", "--engine", "sim"])
            .args(["--served-model-name", "tiny", "--drain-grace", GRACE])
            .args(["--http-port", &http_port.to_string()])
            .arg("--model")
            .arg(model.path())
            .arg("--state-dir")
            .arg(state.path())
            .arg("--")
            .args(engine_flags.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("stator starts");
        let printed = Printed::default();
        let readers = [
            printed.follow(process.stdout.take().expect("piped")),
            printed.follow(process.stderr.take().expect("piped")),
        ];
        Self {
            process,
            printed,
            readers,
            api: (Ipv4Addr::LOCALHOST, http_port).into(),
            state,
            _model: model,
        }
    }

    /// Starts two workers and waits until they answer.
    async fn ready(engine_flags: &str) -> Self {
        let mut launcher = Self::start(ports::free(), engine_flags);
        launcher.until_printed("\nready: ").await;
        launcher
    }

    /// Waits until something is printed.
    async fn until_printed(&mut self, wanted: &str) {
        let Self {
            process, printed, ..
        } = self;
        let holds = || {
            let text = printed.text();
            let ended = process.try_wait().expect("a child of this test");
            assert!(
                ended.is_none() || text.contains(wanted),
                "{ended:?}:\n{text}"
            );
            text.contains(wanted)
        };
        until(wanted, holds).await;
    }

    fn interrupt(&self) {
        let pid = self.process.id().expect("it runs");
        process::signal(pid, Signal::SIGINT);
    }

    /// Waits for the launcher's end; returns its status and all that it printed.
    async fn ended(&mut self) -> (ExitStatus, String) {
        let status = tokio::time::timeout(AT_ONCE, self.process.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("it runs on:\n{}", self.printed.text()));
        for reader in &mut self.readers {
            reader.await.expect("no panic");
        }
        (status.expect("a child of this test"), self.printed.text())
    }

    /// Runs `stator status` for this state folder.
    async fn status(&self, further: &[&str]) -> String {
        let output = stator()
            .arg("status")
            .arg("--state-dir")
            .arg(self.state.path())
            .args(further)
            .output()
            .await
            .expect("stator starts");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Returns what `stator status` says, as JSON.
    async fn topology(&self) -> Value {
        let mut all: Value = serde_json::from_str(&self.status(&["--json"]).await).expect("JSON");
        all[0].take()
    }

    /// Returns the launcher's child of this name.
    async fn child(&self, name: &str) -> u32 {
        let topology = self.topology().await;
        let children = topology["processes"].as_array().expect("processes");
        let child = children
            .iter()
            .find(|child| child["process"]["name"] == name);
        let pid = child.expect(name)["process"]["pid"].as_u64();
        pid.and_then(|pid| pid.try_into().ok()).expect("a pid")
    }

    /// Returns every process that comes of this launcher: roles, their engines, what guards these.
    fn descendants(&self) -> Vec<u32> {
        let mut all = vec![self.process.id().expect("it runs")];
        let mut seen = 0;
        while let Some(parent) = all.get(seen) {
            all.extend(process::children(*parent));
            seen += 1;
        }
        all.split_off(1)
    }

    async fn ask(&self, body: &Value) -> Answered {
        send(self.api, post(CHAT, body.to_string())).await
    }
}

fn chat(max_tokens: u32) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": max_tokens, "ignore_eos": true})
}

/// A request that outlives everything else in a test whose engine is [`SLOW`].
fn endless() -> Value {
    let mut body = chat(400);
    body["stream"] = true.into();
    body
}

async fn until_gone(processes: &[u32]) {
    until("every process has ended", || {
        !processes.iter().any(|pid| process::is_alive(*pid))
    })
    .await;
}

#[tokio::test]
async fn a_topology_answers_is_shown_and_drains_on_ctrl_c() {
    let mut launcher = Launcher::ready(UNHURRIED).await;
    let shown = launcher.status(&[]).await;
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
    let runs = |shown: &str| shown.contains(" 1 running");
    while !runs(&launcher.status(&[]).await) {
        assert!(!running.is_finished(), "over before it was seen");
    }
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
    assert!(launcher.status(&[]).await.starts_with("nothing runs"));
    TcpListener::bind(launcher.api).expect("the port is free");
}

#[tokio::test]
async fn a_second_ctrl_c_ends_at_once() {
    let mut launcher = Launcher::ready(SLOW).await;
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
async fn a_worker_that_dies_is_named_and_ends_the_topology() {
    let mut launcher = Launcher::ready("").await;
    let descendants = launcher.descendants();
    let worker = launcher.child("agg-1").await;
    process::signal(worker, Signal::SIGKILL);
    let (status, printed) = launcher.ended().await;
    assert_eq!(status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("stator: agg-1 was ended by SIGKILL; its last lines"),
        "{printed}"
    );
    until_gone(&descendants).await;
    assert!(launcher.status(&[]).await.starts_with("nothing runs"));
}

#[tokio::test]
async fn a_taken_port_is_told_at_once_and_leaves_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("a bound socket");
    let mut launcher = Launcher::start(addr.port(), "");
    let (status, printed) = launcher.ended().await;
    assert_eq!(status.code(), Some(1), "{printed}");
    let said = format!("stator: {addr} is taken");
    assert!(printed.contains(&said), "{printed}");
    assert!(
        !printed.contains("agg-0"),
        "no worker was started: {printed}"
    );
    assert!(launcher.status(&[]).await.starts_with("nothing runs"));
}
