//! A value that is never printed or logged, and where the plane's token comes from.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The variable that holds the plane's token where no file is named.
const PLANE_TOKEN: &str = "STATOR_PLANE_TOKEN";

/// A value that is never printed or logged.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Returns the value itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// Why a file gives no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file could not be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Going on without a secret would open what was meant to be closed.
    #[error("{0} holds no secret")]
    Empty(PathBuf),
}

/// Returns the token of the request plane, which all roles must read alike: from `file`, else from
/// `STATOR_PLANE_TOKEN`. See `read`.
///
/// # Errors
/// [`SecretError`]: a file that was named and gives none.
pub fn plane_token(
    file: Option<&Path>,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Option<Secret>, SecretError> {
    read(file, PLANE_TOKEN, environment)
}

/// Returns a secret: the first line of `file` that is neither blank nor a comment (`#`), else the variable, in
/// which empty is unset. Blanks around a secret do not count.
///
/// # Errors
/// [`SecretError`]: a file that was named and gives none.
pub(super) fn read(
    file: Option<&Path>,
    variable: &str,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Option<Secret>, SecretError> {
    let Some(path) = file else {
        let secret = environment(variable).unwrap_or_default();
        return Ok(Some(secret.trim())
            .filter(|secret| !secret.is_empty())
            .map(Secret::from));
    };
    let text = fs::read_to_string(path).map_err(|source| SecretError::Read {
        path: path.to_owned(),
        source,
    })?;
    let secret = text
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with('#'))
        .ok_or_else(|| SecretError::Empty(path.to_owned()))?;
    Ok(Some(Secret::from(secret)))
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(value)
    }
}

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self(value.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<hidden>")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("<hidden>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_is_unset() {
        let token = |value: &str| plane_token(None, |_| Some(value.to_owned())).unwrap();
        assert_eq!(token(""), None);
        assert_eq!(token(" \n"), None);
        assert_eq!(token("s3cret\n"), Some(Secret::from("s3cret")));
        assert_eq!(plane_token(None, |_| None).unwrap(), None);
    }

    #[test]
    fn the_first_line_that_says_something_is_the_token_and_a_file_without_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = |text: &str| {
            fs::write(&path, text).unwrap();
            plane_token(Some(&path), |_| Some("of the environment".to_owned()))
        };
        let first = token("# ours\n\n  s3cret  \nanother\n").unwrap();
        assert_eq!(first, Some(Secret::from("s3cret")));
        for text in ["", "\n", "# none\n"] {
            assert!(
                matches!(token(text), Err(SecretError::Empty(_))),
                "{text:?}"
            );
        }
    }
}
