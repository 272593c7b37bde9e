//! What can be set on a relay, and where it comes from: the command line, else the environment, else a file, else the
//! default.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use clap::{CommandFactory, FromArgMatches, Parser};
use serde::{Deserialize, Serialize};
use stator_common::{
    discovery::{self, Discovery, OpenError},
    nats::Nats,
    process,
    settings::{
        self, DiscoveryBackend, EtcdSettings, EventPlane, FileError, KubernetesSettings,
        NatsSettings, NatsSettingsError, SecretError,
        environment::{self, Row},
    },
};

use crate::Place;

/// The port that relays publish on unless told otherwise, and where workers say that theirs is. Questions come on
/// the next one.
pub const PORT: u16 = 5590;

/// Flags that the environment may give.
const ENVIRONMENT: &[Row] = &[
    (
        "discovery-backend",
        &["STATOR_DISCOVERY_BACKEND", "DYN_DISCOVERY_BACKEND"],
    ),
    ("discovery-path", &["STATOR_FILE_KV", "DYN_FILE_KV"]),
    ("event-plane", &["STATOR_EVENT_PLANE", "DYN_EVENT_PLANE"]),
    ("host", &["STATOR_KV_RELAY_HOST"]),
    ("port", &["STATOR_KV_RELAY_PORT"]),
    ("system-host", &["STATOR_SYSTEM_HOST", "DYN_SYSTEM_HOST"]),
    ("system-port", &["STATOR_SYSTEM_PORT", "DYN_SYSTEM_PORT"]),
];

/// Listens to the engines of this machine and tells processors what their KV caches hold.
#[derive(Debug, Parser)]
#[command(name = "stator-kv-relay", version, max_term_width = 100)]
pub struct Cli {
    /// Reads settings from this TOML file; its keys are the names below with underscores.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Prints the configuration that results from file, environment and flags, and ends.
    #[arg(long)]
    pub print_config: bool,

    #[command(flatten)]
    settings: Settings,
}

/// What a person may set. Absent fields leave the choice to the layer below.
#[derive(Debug, Default, clap::Args, Serialize)]
struct Settings {
    /// How workers are found [default: file].
    #[arg(long, value_name = "BACKEND")]
    discovery_backend: Option<DiscoveryBackend>,

    /// Folder of the file discovery [default: stator-UID in the temporary folder].
    #[arg(long, alias = "file-kv", value_name = "DIR")]
    discovery_path: Option<PathBuf>,

    /// How etcd is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    etcd: EtcdSettings,

    /// How Kubernetes is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    kubernetes: KubernetesSettings,

    /// How processors are told: straight (zmq), or over a NATS server [default: zmq].
    #[arg(long, value_name = "PLANE")]
    event_plane: Option<EventPlane>,

    /// How the NATS server is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    nats: NatsSettings,

    /// Address to publish on; whoever reaches it may listen [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS")]
    host: Option<IpAddr>,

    /// Port to publish on; questions come on the next one. 0 takes two free ones. With --event-plane nats nothing
    /// listens there, but the number tells this relay from others of the machine [default: 5590].
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,

    /// Address of /health, /live and /metrics [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS")]
    system_host: Option<IpAddr>,

    /// Port of /health, /live and /metrics; 0 takes a free one, -1 none [default: -1].
    #[arg(long, value_name = "PORT", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-1..=65535))]
    system_port: Option<i32>,
}

/// A relay's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where workers make themselves known. Default `file`.
    pub discovery_backend: DiscoveryBackend,
    /// Folder of the file discovery. Absent: the default that workers use too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery_path: Option<PathBuf>,
    /// How etcd is reached.
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    pub etcd: EtcdSettings,
    /// How Kubernetes is reached.
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    pub kubernetes: KubernetesSettings,
    /// How processors are told. Default `zmq`.
    pub event_plane: EventPlane,
    /// How the NATS server is reached.
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    pub nats: NatsSettings,
    /// Address to publish on. Default 127.0.0.1: this machine only.
    pub host: IpAddr,
    /// Port to publish on; questions come on the next one. 0 takes two free ones. With `nats`, what tells the relay from
    /// others of the machine. Default 5590.
    pub port: u16,
    /// Address of the system routes. Default 127.0.0.1.
    pub system_host: IpAddr,
    /// Port of the system routes; 0 takes a free one, -1 (the default) means none.
    pub system_port: i32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            discovery_backend: DiscoveryBackend::File,
            discovery_path: None,
            etcd: EtcdSettings::default(),
            kubernetes: KubernetesSettings::default(),
            event_plane: EventPlane::Zmq,
            nats: NatsSettings::default(),
            host: [127, 0, 0, 1].into(),
            port: PORT,
            system_host: [127, 0, 0, 1].into(),
            system_port: -1,
        }
    }
}

impl Config {
    /// Opens the place where workers are found.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn discovery(&self) -> Result<Arc<dyn Discovery>, OpenError> {
        let path = self.discovery_path.as_deref();
        discovery::open(self.discovery_backend, path, &self.etcd, &self.kubernetes).await
    }

    /// Returns where to publish.
    pub fn place(&self) -> Place {
        match self.event_plane {
            EventPlane::Zmq => Place::Zmq {
                host: self.host,
                port: self.port,
            },
            EventPlane::Nats => Place::Nats {
                nats: Nats::new(self.nats.clone(), "stator-kv-relay"),
                name: node_name(self.port),
            },
        }
    }
}

/// Returns under which name a relay of this machine publishes at a NATS server: the same after a restart, since the cards of
/// workers say it, and another one for each relay.
///
/// - `port`: which of them is meant, as where they listen at ports.
pub fn node_name(port: u16) -> String {
    format!("node-{}-{port}", process::machine())
}

/// Why the configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("from the environment: {0}")]
    Environment(clap::Error),
    #[error("configuration: {0}")]
    Value(Box<toml::de::Error>),
    #[error("configuration: {0}")]
    Merge(Box<toml::ser::Error>),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Nats(#[from] NatsSettingsError),
    #[error(
        "--port 0: with --event-plane nats the number is the relay's name, which workers must know: leave it out, or say \
         one, and the same in the workers' --kv-relay-address"
    )]
    NoName,
}

/// Loads the configuration.
///
/// - `variable`: looks one up (`std::env::var(..).ok()` outside tests).
///
/// # Errors
/// [`ConfigError`].
pub fn load(cli: &Cli, variable: impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    let mut merged = settings::read_file(cli.config.as_deref())?;
    let shared = environment::ETCD
        .iter()
        .chain(environment::KUBERNETES)
        .chain(environment::NATS);
    let rows = ENVIRONMENT.iter().chain(shared).copied();
    let from_environment = Cli::command()
        .try_get_matches_from(environment::command_line(rows, &variable))
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(ConfigError::Environment)?;
    for settings in [&from_environment.settings, &cli.settings] {
        let layer = toml::Table::try_from(settings);
        let layer = layer.map_err(|error| ConfigError::Merge(Box::new(error)))?;
        settings::overlay(&mut merged, layer);
    }
    let config: Result<Config, _> = merged.try_into();
    let mut config = config.map_err(|error| ConfigError::Value(Box::new(error)))?;
    config.etcd.read_password(&variable)?;
    // What others left in the environment counts only where it is used.
    if config.event_plane == EventPlane::Nats {
        config.nats.complete(&variable)?;
        if config.port == 0 {
            return Err(ConfigError::NoName);
        }
    }
    Ok(config)
}

/// Writes the configuration as TOML that [`load`] reads.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_wins_over_the_environment_and_what_is_printed_can_be_read() {
        let cli = Cli::parse_from(["stator-kv-relay", "--port", "7"]);
        let environment = |name: &str| match name {
            "STATOR_KV_RELAY_PORT" => Some("8".to_owned()),
            "DYN_FILE_KV" => Some("/d".to_owned()),
            _ => None,
        };
        let config = load(&cli, environment).unwrap();
        assert_eq!((config.port, config.system_port), (7, -1));
        assert_eq!(config.discovery_path, Some("/d".into()));
        let text = to_toml(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
        assert!(toml::from_str::<Config>("prot = 1").is_err());
    }

    #[test]
    fn what_is_left_of_nats_in_the_environment_counts_only_where_it_is_used() {
        let environment = |name: &str| (name == "NATS_AUTH_USERNAME").then(|| "u".to_owned());
        let load = |line: &str| load(&Cli::parse_from(line.split(' ')), environment);
        assert!(load("stator-kv-relay").is_ok());
        let refused = load("stator-kv-relay --event-plane nats").unwrap_err();
        assert!(
            refused.to_string().contains("--nats-password-file"),
            "{refused}"
        );
    }

    #[test]
    fn relays_of_a_machine_have_names_of_their_own_at_a_nats_server() {
        assert_ne!(node_name(5590), node_name(5592));
        assert_eq!(node_name(5590), node_name(5590));
        let line = ["stator-kv-relay", "--event-plane", "nats", "--port", "0"];
        let refused = load(&Cli::parse_from(line), |_| None).unwrap_err();
        assert!(
            refused.to_string().contains("--kv-relay-address"),
            "{refused}"
        );
    }

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }
}
