//! From the command line to the processes to start: pure, so that a test can read the result.
//!
//! A [`Plan`] is made once, when contradictions are refused ([`check`]), and describes any process of its topology
//! afterwards: those of the start, and those that come when it is scaled.

mod check;
pub(crate) mod role;
mod spec;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use stator_common::{card::Role, settings::duration};
use stator_engine::flags::Given;

use crate::cli::{Engine, Up};

/// What a topology consists of and how each of its processes is started.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) up: Up,
    pub(crate) model: String,
    /// The topology's own folder.
    pub(crate) dir: PathBuf,
    /// The folder with the other binaries.
    pub(crate) bin: PathBuf,
}

/// What a process is in its topology; unique there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Processor,
    Worker {
        role: Role,
        index: u16,
    },
    /// The secondary node of an engine of such a worker.
    Headless(Role),
}

/// What a process gets that no other process has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    /// Port of its health, status and metrics routes, on loopback.
    pub(crate) system_port: u16,
    /// Its number among all workers, from which the ports of attached engines follow.
    pub(crate) ordinal: u16,
    /// The GPUs that are its own; empty if it sees all there are.
    pub(crate) gpus: Vec<String>,
    /// Whether their numbers are those of the bus, and not those of CUDA's own order.
    pub(crate) in_bus_order: bool,
    /// What its engine's environment needs where engines share the cores of a machine without GPUs.
    pub(crate) cores: Vec<(&'static str, OsString)>,
}

/// One process to start.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Unique in the topology, and the name of its log: `processor`, `agg-0`, ...
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Secrets go here and not into `args`, which every user of the machine can read.
    pub(crate) env: Vec<(&'static str, OsString)>,
    pub(crate) place: Place,
    /// Where its first engine dials in, if it is started elsewhere.
    pub(crate) attach_port: Option<u16>,
}

impl Plan {
    /// Reads a command line.
    ///
    /// # Errors
    /// When flags contradict each other; the text says what would work.
    pub(crate) fn new(up: &Up, model: &str, dir: &Path, bin: &Path) -> Result<Plan> {
        let plan = Plan {
            up: up.clone(),
            model: model.to_owned(),
            dir: dir.to_owned(),
            bin: bin.to_owned(),
        };
        check::contradictions(&plan)?;
        Ok(plan)
    }

    /// Refuses workers of a role that the topology did not start with, if they could not serve.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub(crate) fn allows(&self, role: Role) -> Result<()> {
        check::of_role(self, role)
    }

    /// Returns the base URL of the OpenAI API.
    pub(crate) fn url(&self) -> String {
        let up = &self.up;
        let mut args = up.processor_arg.iter();
        let tls = args.any(|arg| arg.starts_with("--tls-cert"));
        let scheme = if tls { "https" } else { "http" };
        format!("{scheme}://{}:{}", up.http_host, up.http_port)
    }

    /// Returns how many workers of a role the topology starts with.
    pub(crate) fn count(&self, role: Role) -> u16 {
        let up = &self.up;
        match role {
            Role::Agg => up.workers.unwrap_or(u16::from(!self.disaggregated())),
            Role::Prefill => up.prefill_workers.unwrap_or(0),
            Role::Decode => up.decode_workers.unwrap_or(0),
            Role::Encode => 0,
        }
    }

    /// Returns what the worker is whose engine a secondary node belongs to.
    pub(crate) fn headless_role(&self) -> Role {
        let named = self.up.disaggregation_mode.as_deref();
        named.and_then(role::parse).unwrap_or(Role::Agg)
    }

    /// Says whether prompts are computed and continued by different workers.
    pub(crate) fn disaggregated(&self) -> bool {
        self.up.prefill_workers.is_some() || self.up.decode_workers.is_some()
    }

    /// Returns the parts that the topology starts with, the processor first.
    pub(crate) fn parts(&self) -> Vec<Part> {
        if self.up.headless {
            return vec![Part::Headless(self.headless_role())];
        }
        let workers = role::ALL
            .into_iter()
            .flat_map(|role| (0..self.count(role)).map(move |index| Part::Worker { role, index }));
        [Part::Processor].into_iter().chain(workers).collect()
    }

    /// Returns how many GPUs a part has for itself, on this machine.
    pub(crate) fn gpus(&self, part: Part) -> usize {
        if self.up.share_gpus {
            return 0;
        }
        self.devices_of(part)
    }

    /// Returns how many devices a part computes with, on this machine.
    pub(crate) fn devices_of(&self, part: Part) -> usize {
        let Part::Worker { role, .. } = part else {
            return 0;
        };
        if self.up.engine != Engine::Vllm {
            return 0;
        }
        let args = self.engine_args(role);
        let given = Given::read(&args);
        let size = |name| given.value(name).and_then(|size| size.parse().ok());
        let sizes = |name| size(name).unwrap_or(1).max(1);
        let engine: usize = sizes("tensor-parallel-size") * sizes("pipeline-parallel-size");
        engine.div_ceil(sizes("nnodes")) * sizes("data-parallel-size")
    }

    /// Returns how many devices its workers compute with, as it starts.
    pub(crate) fn devices(&self) -> usize {
        self.parts()
            .into_iter()
            .map(|part| self.devices_of(part))
            .sum()
    }

    /// Returns how long a worker waits for its engine, before it gives up.
    pub(crate) fn engine_ready_timeout(&self, role: Role) -> Duration {
        let args = self.engine_args(role);
        let given = Given::read(&args).value("engine-ready-timeout");
        // One that is no time is refused by the worker. The default is the worker's.
        given
            .and_then(|time| duration(time).ok())
            .unwrap_or(Duration::from_secs(600))
    }

    /// Returns the folders of a worker's engines.
    pub(crate) fn run_dirs(&self, part: Part) -> Vec<PathBuf> {
        let own = self.dir.join(part.to_string());
        // As `stator-worker` lays them out.
        match self.up.data_parallel_size.unwrap_or(1) {
            1 => vec![own],
            ranks => (0..ranks)
                .map(|rank| own.join(format!("rank-{rank}")))
                .collect(),
        }
    }

    /// Returns vLLM's flags, and the worker's that are vLLM's too, for the workers of a role.
    fn engine_args(&self, role: Role) -> Vec<String> {
        let up = &self.up;
        let mut args = Vec::new();
        let tp = self.tp(role).map(|(_, size)| size);
        for (flag, size) in [
            ("--tensor-parallel-size", tp),
            ("--data-parallel-size", up.data_parallel_size),
        ] {
            args.extend(size.into_iter().flat_map(|n| [flag.into(), n.to_string()]));
        }
        args.extend_from_slice(self.extra(role));
        args.extend_from_slice(&up.worker_args);
        args
    }

    /// Returns the flag that sets the tensor-parallel size of a role, and its value, if it is given.
    fn tp(&self, role: Role) -> Option<(&'static str, u16)> {
        let up = &self.up;
        let (flag, size) = match role {
            Role::Agg | Role::Encode => ("--tp", up.tp),
            Role::Prefill => ("--prefill-tp", up.prefill_tp),
            Role::Decode => ("--decode-tp", up.decode_tp),
        };
        size.map(|size| (flag, size))
    }

    /// Returns the further arguments of a role.
    fn extra(&self, role: Role) -> &[String] {
        match role {
            Role::Agg | Role::Encode => &[],
            Role::Prefill => &self.up.prefill_arg,
            Role::Decode => &self.up.decode_arg,
        }
    }
}

impl Part {
    /// Returns the role in words.
    pub(crate) fn role(self) -> String {
        match self {
            Part::Processor => "processor".into(),
            Part::Worker { role, .. } => role.to_string(),
            Part::Headless(_) => "headless".into(),
        }
    }

    /// Returns the name of its program.
    pub(crate) fn program(self) -> String {
        match self {
            Part::Processor => "stator-processor".into(),
            Part::Worker { role, .. } | Part::Headless(role) => role::program(role),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Processor | Part::Headless(_) => f.write_str(&self.role()),
            Part::Worker { role, index } => write!(f, "{role}-{index}"),
        }
    }
}
