//! Which Python has vLLM.

use std::path::{Path, PathBuf};

/// There is no Python to be found.
#[derive(Debug, thiserror::Error)]
pub enum PythonError {
    #[error(
        "no Python found that could have vLLM: name one with --python, or a virtual environment in VLLM_VENV"
    )]
    None,
    #[error("{0} is not a file; --python and VLLM_VENV must name an existing Python")]
    Missing(PathBuf),
}

/// Returns the Python that runs the engine: the one named, else that of `$VLLM_VENV`, else that of the
/// active virtual environment, else `.venv` here, else `python3` of the path.
///
/// # Errors
/// [`PythonError`]; a named one that does not exist is never replaced by another.
pub(crate) fn find(
    named: Option<PathBuf>,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, PythonError> {
    if let Some(python) = named {
        return existing(python);
    }
    let in_venv = |folder: String| Path::new(&folder).join("bin/python");
    if let Some(folder) = environment("VLLM_VENV").filter(|folder| !folder.is_empty()) {
        return existing(in_venv(folder));
    }
    let active = environment("VIRTUAL_ENV").map(in_venv);
    let here = Some(in_venv(".venv".to_owned()));
    let on_path = environment("PATH").and_then(|path| on_path("python3", &path));
    [active, here, on_path]
        .into_iter()
        .flatten()
        .find(|python| python.is_file())
        // Absolute: the engine may be started from another folder one day.
        .and_then(|python| std::path::absolute(python).ok())
        .ok_or(PythonError::None)
}

/// Looks a program up.
pub(crate) fn on_path(program: &str, path: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

fn existing(python: PathBuf) -> Result<PathBuf, PythonError> {
    if python.is_file() {
        std::path::absolute(&python).map_err(|_| PythonError::Missing(python))
    } else {
        Err(PythonError::Missing(python))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_python_that_is_missing_is_not_replaced() {
        let result = find(Some("/nowhere/python".into()), &|_| None);
        assert!(matches!(result, Err(PythonError::Missing(_))));
        let venv = |name: &str| (name == "VLLM_VENV").then(|| "/nowhere".to_owned());
        assert!(matches!(find(None, &venv), Err(PythonError::Missing(_))));
    }
}
