//! What every role lets a person set, and how it is written.
//!
//! [`environment`] says which variables stand for which flags. What a role alone lets set is the role's.

pub mod environment;
mod secret;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use environment::{DISAGGREGATION_MODE, Variables};
pub use secret::{Secret, SecretError, plane_token};

/// How workers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscoveryBackend {
    /// Files in a folder of this machine.
    File,
    /// This process's memory: for roles that share a process.
    Mem,
}

/// Reads `30s`, `2m`; a bare number is seconds.
///
/// # Errors
/// Neither, or negative.
pub fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_number_is_seconds() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("-1").is_err());
    }
}
