//! Where a real vLLM is found, and how one is started by hand.
//!
//! - `STATOR_PYTHON`: the Python that has vLLM; default `.venv/bin/python` in the workspace.
//! - `STATOR_TEST_MODEL`: a tiny model; default `.models/tiny` in the workspace.
//! - `STATOR_SKIP_REAL=1`: tests that want them pass without having tried.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What an engine is started with: small, and quick on a CPU.
pub const FLAGS: &str = "--enforce-eager --max-model-len 2048 --max-num-seqs 8 \
                         --kv-cache-memory-bytes 67108864 --block-size 32";

/// What its environment needs: one process where one is enough, and no network.
pub const ENV: [(&str, &str); 4] = [
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("OMP_NUM_THREADS", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("HF_HUB_OFFLINE", "1"),
];

/// A Python that has vLLM, and a model for it.
pub struct Vllm {
    pub python: PathBuf,
    pub model: PathBuf,
}

impl Vllm {
    /// Finds both; `None` if the tests with a real engine are switched off.
    ///
    /// # Panics
    /// If one is missing: a test that nobody runs proves nothing.
    pub fn find() -> Option<Self> {
        Some(Self {
            python: python()?,
            model: given_or("STATOR_TEST_MODEL", ".models/tiny"),
        })
    }

    /// Returns the command of vLLM's own launcher, up to and without `serve`.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.python);
        command
            .args(["-m", "vllm.entrypoints.cli.main"])
            // Without its byte code vLLM compiles itself anew at every start, for half a minute.
            .env_remove("PYTHONDONTWRITEBYTECODE")
            .envs(ENV);
        command
    }
}

/// Finds the Python alone, as [`Vllm::find`] does.
///
/// # Panics
/// If it is missing.
pub fn python() -> Option<PathBuf> {
    if env::var_os("STATOR_SKIP_REAL").is_some_and(|value| value == "1") {
        println!("skipped by STATOR_SKIP_REAL=1");
        return None;
    }
    Some(given_or("STATOR_PYTHON", ".venv/bin/python"))
}

/// Returns the command line of an engine that dials in at `port` of this machine, after `serve MODEL`.
pub fn headless(port: u16) -> Vec<String> {
    let fixed = "--headless --data-parallel-address 127.0.0.1 --data-parallel-size-local 1";
    fixed
        .split_whitespace()
        .map(str::to_owned)
        .chain(["--data-parallel-rpc-port".to_owned(), port.to_string()])
        .collect()
}

/// Returns [`FLAGS`] one by one.
pub fn flags() -> impl Iterator<Item = String> {
    FLAGS.split_whitespace().map(str::to_owned)
}

fn given_or(variable: &str, default: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = env::var_os(variable).map_or_else(|| workspace.join(default), PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: run `make setup`, set {variable}, or STATOR_SKIP_REAL=1",
        path.display()
    );
    path
}
