//! A launcher under test, and what a person does with it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use stator_testkit::http::{Answered, get, post, send};
use stator_testkit::process::{self, Signal};
use stator_testkit::wait::{PATIENCE, PAUSE, until};
use stator_testkit::{model, ports};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

pub(crate) const CHAT: &str = "/v1/chat/completions";

/// Longest wait for the end of a launcher that is not given time to drain: far below [`GRACE`].
const AT_ONCE: Duration = Duration::from_secs(30);
/// Given to every drain, so that one that is cut short shows.
const GRACE: &str = "200s";

/// An engine that can be watched at work.
pub(crate) const UNHURRIED: &str = "--sim-speedup 0.4";
/// An engine that takes half a minute for [`endless`].
pub(crate) const SLOW: &str = "--sim-speedup 0.1";

/// A launcher with its own state folder. Dropping it kills it, and the launcher's children end with it.
pub(crate) struct Launcher {
    process: Child,
    printed: Printed,
    readers: [JoinHandle<()>; 2],
    pub(crate) api: SocketAddr,
    state: tempfile::TempDir,
    _model: tempfile::TempDir,
}

/// What the launcher printed so far, of both streams.
#[derive(Clone, Default)]
pub(crate) struct Printed(Arc<Mutex<String>>);

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
pub(crate) fn stator() -> Command {
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
    /// Starts a topology of this shape (`--workers 2`).
    pub(crate) fn start(http_port: u16, shape: &str, engine_flags: &str) -> Self {
        let state = tempfile::tempdir().expect("temporary folder");
        let model = model::folder();
        let mut process = stator()
            .args(["up", "--engine", "sim"])
            .args(shape.split_whitespace())
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

    /// Starts a topology and waits until it answers.
    pub(crate) async fn ready(shape: &str, engine_flags: &str) -> Self {
        let mut launcher = Self::start(ports::free(), shape, engine_flags);
        launcher.until_printed("\nready: ").await;
        launcher
    }

    /// Waits until something is printed.
    pub(crate) async fn until_printed(&mut self, wanted: &str) {
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

    pub(crate) fn interrupt(&self) {
        let pid = self.process.id().expect("it runs");
        process::signal(pid, Signal::SIGINT);
    }

    /// Waits for the launcher's end; returns its status and all that it printed.
    pub(crate) async fn ended(&mut self) -> (ExitStatus, String) {
        let status = tokio::time::timeout(AT_ONCE, self.process.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("it runs on:\n{}", self.printed.text()));
        for reader in &mut self.readers {
            reader.await.expect("no panic");
        }
        (status.expect("a child of this test"), self.printed.text())
    }

    /// Runs another command for this state folder.
    pub(crate) async fn command(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = stator();
        command
            .arg(words.next().expect("a command"))
            .arg("--state-dir")
            .arg(self.state.path())
            .args(words);
        command.output().await.expect("stator starts")
    }

    /// Runs `stator status` for this state folder.
    pub(crate) async fn status(&self, further: &str) -> String {
        let output = self.command(&format!("status {further}")).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Returns what `stator status` says, as JSON.
    pub(crate) async fn topology(&self) -> Value {
        let mut all: Value = serde_json::from_str(&self.status("--json").await).expect("JSON");
        all[0].take()
    }

    /// Returns the launcher's child of this name.
    pub(crate) async fn child(&self, name: &str) -> u32 {
        let topology = self.topology().await;
        let children = topology["processes"].as_array().expect("processes");
        let child = children
            .iter()
            .find(|child| child["process"]["name"] == name);
        let pid = child.expect(name)["process"]["pid"].as_u64();
        pid.and_then(|pid| pid.try_into().ok()).expect("a pid")
    }

    /// Waits until `stator status` says this of a child.
    pub(crate) async fn until_state(&self, name: &str, state: &str) {
        let mut last = String::new();
        let look = async {
            loop {
                last = self.status("").await;
                let row = last
                    .lines()
                    .find(|line| line.trim_start().starts_with(name));
                if row.is_some_and(|row| row.contains(&format!(" {state} "))) {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        let looked = tokio::time::timeout(PATIENCE, look).await;
        looked.unwrap_or_else(|_| panic!("{name} is never {state}:\n{last}"));
    }

    /// Waits until a worker computes one request.
    pub(crate) async fn until_running(&self) {
        while !self.status("").await.contains(" 1 running") {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns the names of the launcher's children.
    pub(crate) async fn names(&self) -> Vec<String> {
        let topology = self.topology().await;
        let children = topology["processes"].as_array().expect("processes");
        let names = children
            .iter()
            .map(|child| child["process"]["name"].as_str());
        names.map(|name| name.expect("a name").to_owned()).collect()
    }

    /// Returns the engine that a worker wrote down.
    pub(crate) fn engine(&self, worker: &str) -> u32 {
        let record = self
            .state
            .path()
            .join("default")
            .join(worker)
            .join("engine.json");
        let text = std::fs::read_to_string(record).expect("a record");
        let record: Value = serde_json::from_str(&text).expect("JSON");
        let pid = record["process"]["pid"].as_u64();
        pid.and_then(|pid| pid.try_into().ok()).expect("a pid")
    }

    /// Returns every process that comes of this launcher: roles, their engines, what guards these.
    pub(crate) fn descendants(&self) -> Vec<u32> {
        let mut all = vec![self.process.id().expect("it runs")];
        let mut seen = 0;
        while let Some(parent) = all.get(seen) {
            all.extend(process::children(*parent));
            seen += 1;
        }
        all.split_off(1)
    }

    /// Returns what the processor believes of its workers.
    pub(crate) async fn workers(&self) -> Vec<Value> {
        let mut answer = send(self.api, get("/workers")).await.json();
        match answer["models"][0]["targets"].take() {
            Value::Array(targets) => targets,
            other => panic!("no targets: {other}"),
        }
    }

    /// Says whether prompts wait in a line that processors share.
    pub(crate) async fn is_shared(&self) -> bool {
        let answered = send(self.api, get("/workers")).await.json();
        answered["models"][0]["prefill_queue"]["shared"] == true
    }

    /// Waits until the processor has heard of every worker what it caches.
    pub(crate) async fn until_caches_are_known(&self) {
        let known = |target: &Value| target["cache"]["known_from"] == "events";
        while !self.workers().await.iter().all(known) {
            tokio::time::sleep(PAUSE).await;
        }
    }

    pub(crate) async fn ask(&self, body: &Value) -> Answered {
        send(self.api, post(CHAT, body.to_string())).await
    }
}

pub(crate) fn chat(max_tokens: u32) -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": max_tokens, "ignore_eos": true})
}

/// A request that outlives everything else in a test whose engine is [`SLOW`].
pub(crate) fn endless() -> Value {
    let mut body = chat(400);
    body["stream"] = true.into();
    body
}

pub(crate) async fn until_gone(processes: &[u32]) {
    until("every process has ended", || {
        !processes.iter().any(|pid| process::is_alive(*pid))
    })
    .await;
}
