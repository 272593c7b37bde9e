//! What the stories of `real_vllm.rs` are told with.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader},
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use stator_engine::{
    Config, Engine, Finish, Launch, Request, RequestError, RequestKey, Sampling, Spawn, Step,
    StepSink, Tokens, Waits,
};
use tokio::sync::mpsc;

/// Longest wait for anything. An engine on a busy two-core machine needs a minute to start.
const PATIENCE: Duration = Duration::from_secs(300);

/// One engine starts at a time; several at once take each other's processor and memory.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Waits for the turn of a test that starts engines.
pub(crate) async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    TURN.lock().await
}

/// A Python that has vLLM, and a model for it.
pub(crate) struct Python {
    pub(crate) python: PathBuf,
    pub(crate) model: PathBuf,
}

impl Python {
    /// Finds both; `None` if the tests with a real engine are switched off.
    ///
    /// # Panics
    /// If one is missing: a test that nobody runs proves nothing.
    pub(crate) fn find() -> Option<Self> {
        if env::var_os("STATOR_SKIP_REAL").is_some_and(|value| value == "1") {
            println!("skipped by STATOR_SKIP_REAL=1");
            return None;
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let path =
            |key, default| env::var_os(key).map_or_else(|| root.join(default), PathBuf::from);
        let found = Self {
            python: path("STATOR_PYTHON", ".venv/bin/python"),
            model: path("STATOR_TEST_MODEL", ".models/tiny"),
        };
        for path in [&found.python, &found.model] {
            assert!(
                path.exists(),
                "{} is missing; set up, or STATOR_SKIP_REAL=1",
                path.display()
            );
        }
        Some(found)
    }

    fn args() -> Vec<String> {
        let args = "--enforce-eager --max-model-len 2048 --max-num-seqs 8 \
                    --kv-cache-memory-bytes 67108864 --block-size 32";
        args.split_whitespace().map(str::to_owned).collect()
    }

    fn env() -> Vec<(&'static str, &'static str)> {
        vec![
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
            ("OMP_NUM_THREADS", "1"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("HF_HUB_OFFLINE", "1"),
        ]
    }

    fn spawn(&self) -> Spawn {
        Spawn {
            python: self.python.clone(),
            model: self.model.display().to_string(),
            args: Self::args(),
            env: Self::env()
                .into_iter()
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        }
    }
}

/// A configuration that still lacks its launch.
pub(crate) fn config(launch: Launch, dir: &Path, keep: bool) -> Config {
    Config {
        launch,
        run_dir: dir.join("engine-0"),
        keep,
        dp_rank: 0,
        vocab_size: None,
        any_version: false,
        waits: Waits {
            ready: PATIENCE,
            ..Waits::default()
        },
    }
}

pub(crate) fn spawn_config(python: &Python, dir: &Path, keep: bool) -> Config {
    config(Launch::Spawn(python.spawn()), dir, keep)
}

/// A greedy request for exactly `max_tokens` tokens.
pub(crate) fn request(id: &str, prompt: Range<u32>, max_tokens: u32) -> Request {
    Request {
        id: id.to_owned(),
        prompt: Tokens::from(
            prompt
                .map(|token| token % 400)
                .collect::<Vec<u32>>()
                .as_slice(),
        ),
        sampling: Sampling {
            temperature: Some(0.0),
            max_tokens,
            ignore_eos: true,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

/// What a sink has seen so far.
pub(crate) struct Collected {
    steps: mpsc::UnboundedReceiver<Step>,
    streams: HashMap<RequestKey, Stream>,
    running: Option<u32>,
}

#[derive(Default)]
struct Stream {
    tokens: Vec<u32>,
    finishes: Vec<Finish>,
    error: Option<RequestError>,
}

impl Collected {
    /// Returns a sink and what it has seen.
    pub(crate) fn new() -> (impl StepSink, Self) {
        let (sender, steps) = mpsc::unbounded_channel();
        let sink = move |step: Step| {
            let _ = sender.send(step);
        };
        (
            sink,
            Self {
                steps,
                streams: HashMap::new(),
                running: None,
            },
        )
    }

    async fn step(&mut self) {
        let step = tokio::time::timeout(PATIENCE, self.steps.recv()).await;
        let step = step
            .expect("a step in time")
            .expect("the engine is not dropped");
        if let Some(stats) = step.stats {
            self.running = Some(stats.running + stats.waiting);
        }
        for output in step.outputs {
            let stream = self.streams.entry(output.key).or_default();
            stream.tokens.extend_from_slice(&output.tokens);
            stream.finishes.extend(output.finish);
            stream.error = stream.error.take().or(output.error.map(|error| *error));
        }
    }

    fn stream(&self, key: RequestKey) -> Option<&Stream> {
        self.streams.get(&key)
    }

    /// Waits for the end of a stream; returns all its tokens.
    pub(crate) async fn finished(&mut self, key: RequestKey) -> (Vec<u32>, Finish) {
        loop {
            if let Some(stream) = self.stream(key)
                && let Some(finish) = stream.finishes.first()
            {
                return (stream.tokens.clone(), *finish);
            }
            self.step().await;
        }
    }

    /// Waits for the first tokens of a stream.
    pub(crate) async fn tokens_of(&mut self, key: RequestKey) {
        while self
            .stream(key)
            .is_none_or(|stream| stream.tokens.is_empty())
        {
            self.step().await;
        }
    }

    /// Waits until the engine says that it has this many requests.
    pub(crate) async fn running_is(&mut self, count: u32) {
        self.running = None;
        while self.running != Some(count) {
            self.step().await;
        }
    }

    pub(crate) fn error(&self, key: RequestKey) -> Option<&RequestError> {
        self.stream(key)?.error.as_ref()
    }

    /// How often a stream has ended, everything included that is on its way.
    pub(crate) fn finishes(&mut self, key: RequestKey) -> usize {
        while let Ok(step) = self.steps.try_recv() {
            for output in step.outputs {
                self.streams
                    .entry(output.key)
                    .or_default()
                    .finishes
                    .extend(output.finish);
            }
        }
        self.stream(key).map_or(0, |stream| stream.finishes.len())
    }

    /// Waits until the engine has nothing left but what is asked of it here: each request makes it
    /// take a step, and each step says how many are left.
    pub(crate) async fn idle_after_requests(&mut self, engine: &Engine) {
        loop {
            let handle = engine.submit(request("probe", 30..40, 2)).expect("submit");
            self.running = None;
            self.finished(handle.key()).await;
            while self.running.is_none() {
                self.step().await;
            }
            if self.running == Some(0) {
                return;
            }
        }
    }
}

/// A worker in a process of its own: it starts an engine, begins two long requests, and waits.
pub(crate) struct Worker {
    process: Child,
}

/// Where the worker process finds its engine's directory, and whether it keeps the engine.
const WORKER_DIR: &str = "STATOR_TEST_WORKER_DIR";
const WORKER_KEEP: &str = "STATOR_TEST_WORKER_KEEP";

impl Worker {
    /// Runs this test binary again, as the test that is a worker.
    pub(crate) fn spawn(python: &Python, dir: &Path, keep: bool) -> Self {
        let process = Command::new(env::current_exe().expect("this binary"))
            .args(["--exact", "a_worker_process", "--ignored", "--nocapture"])
            .env("STATOR_PYTHON", &python.python)
            .env("STATOR_TEST_MODEL", &python.model)
            .env(WORKER_DIR, dir)
            .env(WORKER_KEEP, if keep { "1" } else { "0" })
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn a worker");
        Self { process }
    }

    /// What the process does. Returns at once in any other process.
    pub(crate) async fn run() {
        let Some(dir) = env::var_os(WORKER_DIR) else {
            return;
        };
        let keep = env::var_os(WORKER_KEEP).is_some_and(|keep| keep == "1");
        let python = Python::find().expect("its parent found one");
        let (sink, mut collected) = Collected::new();
        let config = spawn_config(&python, Path::new(&dir), keep);
        let engine = Engine::start(config, sink)
            .await
            .expect("the engine starts");
        let orphans =
            ["orphan", "live"].map(|id| engine.submit(request(id, 30..40, 1900)).expect("submit"));
        for orphan in &orphans {
            collected.tokens_of(orphan.key()).await;
        }
        println!("engine {}", engine.info().pid.expect("a process"));
        std::future::pending::<()>().await;
    }

    /// Waits until both requests have tokens; returns the engine's process.
    pub(crate) async fn engine_pid(&mut self) -> u32 {
        let stdout = self.process.stdout.take().expect("piped");
        let read = tokio::task::spawn_blocking(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines
                .filter_map(|line| line.split("engine ").nth(1)?.trim().parse().ok())
                .next()
        });
        read.await
            .expect("read")
            .expect("the worker says which process its engine is")
    }

    pub(crate) fn kill_9(&mut self) {
        self.process.kill().expect("kill");
        self.process.wait().expect("reap");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts an engine as a person would who wants it to dial in at `port`, in a group of its own.
pub(crate) struct ByHand(Child);

impl ByHand {
    pub(crate) fn start(python: &Python, port: u16, dir: &Path) -> Self {
        use std::os::unix::process::CommandExt;
        let log = fs::File::create(dir.join("by-hand.log")).expect("log");
        let child = Command::new(&python.python)
            .args(["-m", "vllm.entrypoints.cli.main", "serve"])
            .arg(&python.model)
            .args(Python::args())
            .args(["--headless", "--data-parallel-address", "127.0.0.1"])
            .args(["--data-parallel-rpc-port", &port.to_string()])
            .args(["--data-parallel-size-local", "1"])
            .env_remove("PYTHONDONTWRITEBYTECODE")
            .envs(Python::env())
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("log"))
            .stdout(log)
            .process_group(0)
            .spawn()
            .expect("spawn");
        Self(child)
    }

    /// Makes the whole engine stand still.
    pub(crate) fn stop(&self) {
        signal(&format!("-{}", self.0.id()), "STOP");
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        signal(&format!("-{}", self.0.id()), "KILL");
        let _ = self.0.wait();
    }
}

/// Returns the EngineCore process behind vLLM's launcher.
pub(crate) fn engine_core(launcher: u32) -> u32 {
    let is_core = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name.starts_with("VLLM::Engine"))
    };
    group_members(launcher)
        .into_iter()
        .find(is_core)
        .expect("an EngineCore in the group")
}

/// Returns the live processes of a group.
pub(crate) fn group_members(group: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| process_fields(*pid).is_some_and(|(state, of)| of == group && state != "Z"))
        .collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    process_fields(pid).is_some_and(|(state, _)| state != "Z")
}

/// State and group of a process.
fn process_fields(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.to_owned();
    Some((state, fields.nth(1)?.parse().ok()?))
}

pub(crate) fn kill_9(pid: u32) {
    signal(&pid.to_string(), "KILL");
}

fn signal(target: &str, signal: &str) {
    let status = Command::new("/bin/kill")
        .args(["-s", signal, "--", target])
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "kill -s {signal} -- {target}"
    );
}

/// Waits for a state of affairs.
pub(crate) async fn until(mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("in time");
}

pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.local_addr().expect("address").port()
}
