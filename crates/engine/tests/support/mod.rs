//! What the stories of `real_vllm.rs` are told with.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader},
    ops::Range,
    path::Path,
    process::{Child, Command, Stdio},
};

use stator_engine::{
    Config, DeadReason, Engine, Finish, Launch, Request, RequestError, RequestKey, Sampling, Spawn,
    State, Step, StepSink, Tokens, Waits,
};
use stator_testkit::process::{Group, group_members};
use stator_testkit::vllm::{self, Vllm};
use stator_testkit::wait::PATIENCE;
use tokio::sync::mpsc;

/// One engine starts at a time; several at once take each other's processor and memory.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Waits for the turn of a test that starts engines.
pub(crate) async fn turn() -> tokio::sync::MutexGuard<'static, ()> {
    TURN.lock().await
}

/// A configuration that still lacks its launch.
pub(crate) fn config(launch: Launch, dir: &Path, keep: bool) -> Config {
    Config {
        launch,
        run_dir: dir.join("engine-0"),
        keep,
        dp_rank: 0,
        lockstep: None,
        vocab_size: None,
        adapters: Vec::new(),
        any_version: false,
        waits: Waits {
            ready: PATIENCE,
            ..Waits::default()
        },
    }
}

pub(crate) fn spawn_config(vllm: &Vllm, dir: &Path, keep: bool) -> Config {
    let own = |(key, value): (&str, &str)| (key.into(), value.into());
    let spawn = Spawn {
        python: vllm.python.clone(),
        model: vllm.model.display().to_string(),
        args: vllm::flags().collect(),
        env: vllm::ENV.map(own).to_vec(),
    };
    config(Launch::Spawn(spawn), dir, keep)
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

/// Starts an engine; returns it with what its sink sees.
pub(crate) async fn start(config: Config) -> (Engine, Collected) {
    let (sink, collected) = Collected::new();
    let engine = Engine::start(config, sink).await;
    (engine.expect("the engine starts"), collected)
}

/// Waits for the engine's end; returns what was noticed of it.
pub(crate) async fn dead(engine: &Engine) -> DeadReason {
    let mut state = engine.state();
    let wait = state.wait_for(|state| matches!(state, State::Dead(_)));
    match &*wait.await.expect("state") {
        State::Dead(reason) => reason.clone(),
        _ => unreachable!("waited for"),
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
    pub(crate) fn spawn(vllm: &Vllm, dir: &Path, keep: bool) -> Self {
        let process = Command::new(env::current_exe().expect("this binary"))
            .args(["--exact", "a_worker_process", "--ignored", "--nocapture"])
            .env("STATOR_PYTHON", &vllm.python)
            .env("STATOR_TEST_MODEL", &vllm.model)
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
        let vllm = Vllm::find().expect("its parent found one");
        let (engine, mut collected) = start(spawn_config(&vllm, Path::new(&dir), keep)).await;
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

/// Starts an engine as a person would who wants it to dial in at `port`.
pub(crate) fn start_by_hand(vllm: &Vllm, port: u16, dir: &Path) -> Group {
    let log = fs::File::create(dir.join("by-hand.log")).expect("log");
    let mut command = vllm.command();
    command
        .arg("serve")
        .arg(&vllm.model)
        .args(vllm::flags())
        .args(vllm::headless(port))
        .stdin(Stdio::null())
        .stderr(log.try_clone().expect("log"))
        .stdout(log);
    Group::spawn(&mut command)
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
