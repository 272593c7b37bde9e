//! What every role lets a person set, and how it is written.
//!
//! [`environment`] says which variables stand for which flags. What a role alone lets set is the role's.

pub mod deprecated;
pub mod environment;
mod etcd;
mod file;
mod kubernetes;
mod nats;
mod plane_tls;
mod secret;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use environment::{
    DISAGGREGATION_MODE, IS_DECODE_WORKER, IS_PREFILL_WORKER, Variables, of_the_role,
};
pub use etcd::EtcdSettings;
pub use file::{FileError, read_file};
pub use kubernetes::KubernetesSettings;
pub use nats::{NatsSettings, NatsSettingsError};
pub use plane_tls::RequestPlaneTls;
pub use secret::{Secret, SecretError, plane_token};

/// How workers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscoveryBackend {
    /// Files in a folder of this machine.
    File,
    /// etcd, for clusters.
    Etcd,
    /// The pods of a Kubernetes cluster.
    Kubernetes,
    /// This process's memory: for roles that share a process.
    Mem,
}

/// How news of KV caches goes from workers to processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventPlane {
    /// Straight from process to process.
    Zmq,
    /// Over a NATS server.
    Nats,
}

/// Lays one layer of settings over another: what both have is the upper one's, in tables within tables, too.
pub fn overlay(lower: &mut toml::Table, upper: toml::Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => overlay(below, above),
            (_, value) => {
                lower.insert(key, value);
            }
        }
    }
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
    fn the_upper_layer_wins_key_by_key() {
        let mut lower: toml::Table = "a = 1\nb = 1\n[etcd]\nprefix = 'x'\nusername = 'u'"
            .parse()
            .unwrap();
        let upper = "b = 2\n[etcd]\nprefix = 'y'".parse().unwrap();
        overlay(&mut lower, upper);
        let expected = "a = 1\nb = 2\n[etcd]\nprefix = 'y'\nusername = 'u'"
            .parse()
            .unwrap();
        assert_eq!(lower, expected);
    }

    #[test]
    fn a_bare_number_is_seconds() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("-1").is_err());
    }
}
