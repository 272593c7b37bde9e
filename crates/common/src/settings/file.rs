//! Reading a file of settings.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Why a file gives no settings.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not TOML.
    #[error("parse {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
}

/// Reads a file of settings; without one there are none.
///
/// # Errors
/// [`FileError`].
pub fn read_file(path: Option<&Path>) -> Result<toml::Table, FileError> {
    let Some(path) = path else {
        return Ok(toml::Table::new());
    };
    let text = fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.to_owned(),
        source,
    })?;
    text.parse().map_err(|source| FileError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}
