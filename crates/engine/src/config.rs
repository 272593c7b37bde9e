//! How one engine is started or found, and how long to wait for it.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use crate::{adapter::Adapter, lockstep::Lockstep};

/// One engine of a worker. Data-parallel ranks of a dense model are independent engines: one
/// `Config` each, with a `run_dir` of its own.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the engine comes from.
    pub launch: Launch,
    /// Directory of this engine alone: its endpoints, its log, and the record that lets a restarted
    /// worker find it again. Created if it is missing. Two processes cannot use it at once.
    pub run_dir: PathBuf,
    /// Whether the engine survives its worker, so that the next worker adopts it without loading the
    /// model again. `false`: it ends with the worker, however the worker ends.
    pub keep: bool,
    /// The data-parallel rank that [`crate::EngineInfo`] reports. Without [`Config::lockstep`] the engine
    /// itself is rank 0 of 1; dense ranks know nothing of each other.
    pub dp_rank: u32,
    /// What the ranks have in common, where they step together.
    pub lockstep: Option<Lockstep>,
    /// Tokens that the model knows, for the validation of requests. Absent: from the `config.json` of
    /// the model's folder, and a start fails where there is none.
    pub vocab_size: Option<u32>,
    /// LoRA adapters that the engine loads before it counts as started. Their ids differ. An engine that had others,
    /// or the same with other files, is not adopted; and none counts as started whose adapters' files are not those
    /// that were read for this.
    ///
    /// Of an attached engine the files are taken to be those at the same path here. Where it sees other ones there,
    /// nothing tells.
    pub adapters: Vec<Adapter>,
    /// Accept a vLLM outside the range that the wire was tested with.
    pub any_version: bool,
    /// How long to wait for what.
    pub waits: Waits,
}

/// Where the engine comes from.
#[derive(Clone, Debug)]
pub enum Launch {
    /// A headless vLLM as our child.
    Spawn(Spawn),
    /// An engine that somebody else starts with `--headless`, and that dials us.
    Attach(Attach),
    /// A simulated engine as our child.
    Simulate(Simulate),
}

impl Launch {
    /// Returns the vLLM flags that the engine was, or will be, started with.
    pub(crate) fn args(&self) -> &[String] {
        match self {
            Launch::Spawn(spawn) => &spawn.args,
            Launch::Attach(attach) => &attach.args,
            Launch::Simulate(simulate) => &simulate.args,
        }
    }
}

/// A headless vLLM as our child.
#[derive(Clone, Debug)]
pub struct Spawn {
    /// The Python that has vLLM (`.venv/bin/python`).
    pub python: PathBuf,
    /// Model folder or name, as vLLM takes it.
    pub model: String,
    /// vLLM's own arguments, verbatim.
    pub args: Vec<String>,
    /// Environment that is set for the engine beside the worker's own.
    pub env: Vec<(OsString, OsString)>,
}

/// A simulated engine as our child: a program that takes the arguments of `vllm` and speaks its wire.
#[derive(Clone, Debug)]
pub struct Simulate {
    /// The program (`stator-sim`).
    pub program: PathBuf,
    /// Model folder, for its configuration.
    pub model: String,
    /// vLLM's arguments, and the program's own.
    pub args: Vec<String>,
    /// Environment that is set for it beside the worker's own.
    pub env: Vec<(OsString, OsString)>,
}

impl Simulate {
    /// Returns it as the child that it is; `python` is the program.
    pub(crate) fn to_spawn(&self) -> Spawn {
        Spawn {
            python: self.program.clone(),
            model: self.model.clone(),
            args: self.args.clone(),
            env: self.env.clone(),
        }
    }
}

/// An engine that somebody else starts.
#[derive(Clone, Debug)]
pub struct Attach {
    /// Where the engine's handshake arrives: `host:port`, the engine's `--data-parallel-address` and
    /// `--data-parallel-rpc-port`.
    pub bind: String,
    /// The host under which the engine reaches us for requests and outputs. Absent: the host of
    /// `bind`; must be given where that is a wildcard.
    pub advertise: Option<String>,
    /// Folder of the model on this machine, for `vocab_size`. Absent: [`Config::vocab_size`] says it.
    pub model: Option<PathBuf>,
    /// vLLM flags that the engine was started with, as far as they bear on what requests may ask:
    /// `--max-logprobs`, `--structured-outputs-config`, `--reasoning-parser`, `--speculative-config`,
    /// `--skip-tokenizer-init`. The engine does not report them.
    pub args: Vec<String>,
}

/// How long to wait for what.
#[derive(Clone, Debug)]
pub struct Waits {
    /// From the start to the engine's READY, model loading included.
    pub ready: Duration,
    /// For a kept engine to dial in again and to answer; after that it is ended and started afresh.
    pub adopt: Duration,
    /// For an engine whose connection broke to come back before it counts as dead.
    pub reconnect: Duration,
    /// For an engine that was asked to end before it is killed.
    pub shutdown: Duration,
    /// Silence after which the engine is asked for a sign of life. Also the interval of the questions.
    pub probe_interval: Duration,
    /// Silence after a question that makes the engine dead. Utility calls queue behind the running
    /// step, so this must exceed the longest step (a first long prefill, a compilation).
    pub probe_deadline: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            // vLLM's own VLLM_ENGINE_READY_TIMEOUT_S.
            ready: Duration::from_secs(600),
            // The engine redials every 100 ms (ZMQ's default); a busy step may hold its answer back.
            adopt: Duration::from_secs(15),
            reconnect: Duration::from_secs(3),
            shutdown: Duration::from_secs(10),
            probe_interval: Duration::from_secs(10),
            probe_deadline: Duration::from_secs(180),
        }
    }
}
