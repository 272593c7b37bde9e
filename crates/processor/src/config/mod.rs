//! What can be set on a processor, and where each setting comes from.
//!
//! One [`Settings`] holds what a person may say, each field optional. It is read three times: from the
//! file, from the environment (turned into flags, so that both are parsed and refused alike) and from
//! the command line; the later one wins, and [`Config`] holds the result with the defaults filled in.

mod cli;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pool::RouterMode;

pub use cli::{Cli, Settings, command};

/// A processor's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address or name to listen on. Default 127.0.0.1: this machine only.
    pub http_host: String,
    /// Port to listen on. 0 takes a free one. Default 8000.
    pub http_port: u16,
    /// Address of the system routes. Default 127.0.0.1.
    pub system_host: String,
    /// Port of the system routes, which ask for no key: /health, /live, /status, /metrics, /workers. 0 takes a
    /// free one; -1, the default, none.
    pub system_port: i32,
    /// Certificate chain (PEM). Absent: plain text. Goes with `tls_key_path`.
    pub tls_cert_path: Option<PathBuf>,
    /// Private key of the certificate (PEM).
    pub tls_key_path: Option<PathBuf>,
    /// Keys of which a client must send one. Empty, and no file: nobody is asked for a key.
    pub api_key: Vec<Secret>,
    /// File with further keys, one per line.
    pub api_key_file: Option<PathBuf>,
    /// Whether /metrics and /workers ask for a key as well. Default false.
    pub metrics_auth: bool,
    /// Threads that serve connections. 0, the default: one per eight cores, at least one. A thread serves some
    /// ten thousand requests or hundreds of thousands of tokens per second; more of them than needed
    /// wake each other up. Long prompts have threads of their own.
    pub threads: usize,
    /// Largest request body in bytes. Default 64 MiB.
    pub max_body_bytes: usize,
    /// Time from the first byte of a request (or of a connection) to the end of its header. Default 15 s.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// Longest pause while a request's body arrives. Default 30 s.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// Time that a connection may stay open without a request. Default 2 min.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Time that running requests get to finish after SIGTERM. Default 30 s; zero cuts them off at once.
    #[serde(with = "humantime_serde")]
    pub drain_grace: Duration,
    /// File with the secret that workers ask for. Absent: `STATOR_PLANE_TOKEN`, or none.
    pub plane_token_file: Option<PathBuf>,
    /// The secret that workers ask for, from that file or variable.
    #[serde(skip)]
    pub plane_token: Option<Secret>,
    /// Namespace whose workers are used. Absent: every namespace.
    pub namespace: Option<String>,
    /// How workers are found. Default `file`.
    pub discovery_backend: DiscoveryBackend,
    /// Folder of the file discovery. Absent: the default that workers use too.
    pub discovery_path: Option<PathBuf>,
    /// How a worker is chosen. Default `round-robin`.
    pub router_mode: RouterMode,
    /// Name of the field that carries a reasoning model's thoughts. Default `reasoning_content`.
    pub reasoning_field_name: ReasoningField,
    /// Whether requests may bring chat templates of their own. A template is bounded in time but not in
    /// memory. Default false: such requests get 400.
    pub trust_request_chat_template: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http_host: "127.0.0.1".to_owned(),
            http_port: 8000,
            system_host: "127.0.0.1".to_owned(),
            system_port: -1,
            tls_cert_path: None,
            tls_key_path: None,
            api_key: Vec::new(),
            api_key_file: None,
            metrics_auth: false,
            threads: 0,
            max_body_bytes: 64 << 20,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            drain_grace: Duration::from_secs(30),
            plane_token_file: None,
            plane_token: None,
            namespace: None,
            discovery_backend: DiscoveryBackend::File,
            discovery_path: None,
            router_mode: RouterMode::RoundRobin,
            reasoning_field_name: ReasoningField::ReasoningContent,
            trust_request_chat_template: false,
        }
    }
}

/// How workers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiscoveryBackend {
    /// Files in a folder of this machine.
    File,
    /// This process's memory: for workers that run in the same process.
    Mem,
}

/// The name of the field that carries a reasoning model's thoughts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ReasoningField {
    /// DeepSeek's name, which most clients know.
    ReasoningContent,
    /// The name that vLLM writes since 0.11.
    Reasoning,
}

impl ReasoningField {
    /// Returns the name as it stands in an answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReasoningContent => "reasoning_content",
            Self::Reasoning => "reasoning",
        }
    }
}

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

/// Why the configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("parse {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// An environment variable holds a value that its flag would refuse.
    #[error("from the environment: {0}")]
    Environment(String),
    /// A key is unknown or its value has the wrong type.
    #[error("configuration: {0}")]
    Value(toml::de::Error),
    /// Two settings contradict each other.
    #[error("{0}")]
    Contradiction(&'static str),
    /// The key file holds no key; starting without any would open what was meant to be closed.
    #[error("{path} holds no key")]
    NoKeys {
        /// The file.
        path: PathBuf,
    },
}

/// Loads the configuration: command line over environment over file over default.
///
/// - `environment`: looks a variable up (`std::env::var(..).ok()` outside tests).
///
/// # Errors
/// [`ConfigError`].
pub fn load(
    cli: &Cli,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Config, ConfigError> {
    let mut merged = match &cli.config {
        Some(path) => read_file(path)?,
        None => toml::Table::new(),
    };
    merged.extend(cli::layer(&cli::from_environment(&environment)?));
    merged.extend(cli::layer(&cli.settings));
    let mut config: Config = merged.try_into().map_err(ConfigError::Value)?;
    if config.tls_cert_path.is_some() != config.tls_key_path.is_some() {
        return Err(ConfigError::Contradiction(
            "tls_cert_path and tls_key_path go together: give both or neither",
        ));
    }
    if let Some(path) = config.api_key_file.clone() {
        config.api_key.extend(read_keys(&path)?);
    }
    config.plane_token = match &config.plane_token_file {
        Some(path) => read_keys(path)?.into_iter().next(),
        None => environment("STATOR_PLANE_TOKEN").map(Secret),
    };
    if config.api_key.iter().any(|key| key.0.is_empty()) {
        return Err(ConfigError::Contradiction("an api key is empty"));
    }
    Ok(config)
}

/// Writes the configuration as TOML that [`load`] reads, secrets hidden.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

fn read_file(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = read(path)?;
    text.parse().map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source,
    })
}

fn read_keys(path: &Path) -> Result<Vec<Secret>, ConfigError> {
    let text = read(path)?;
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<Secret> = lines.map(Secret::from).collect();
    if keys.is_empty() {
        return Err(ConfigError::NoKeys {
            path: path.to_owned(),
        });
    }
    Ok(keys)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::cli::ENVIRONMENT;
    use super::*;

    fn cli(arguments: &[&str]) -> Cli {
        Cli::try_parse_from(std::iter::once(&"stator-processor").chain(arguments)).unwrap()
    }

    #[test]
    fn a_bare_number_is_seconds() {
        let config = load(
            &cli(&["--drain-grace", "45", "--idle-timeout", "1m"]),
            no_environment,
        );
        let config = config.unwrap();
        assert_eq!(config.drain_grace, Duration::from_secs(45));
        assert_eq!(config.idle_timeout, Duration::from_secs(60));
    }

    fn no_environment(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn nothing_said_gives_the_defaults() {
        assert_eq!(load(&cli(&[]), no_environment).unwrap(), Config::default());
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("processor.toml");
        std::fs::write(
            &file,
            "http_host = \"a\"\nhttp_port = 1\nidle_timeout = \"5s\"\n",
        )
        .unwrap();
        let environment = |name: &str| match name {
            "DYN_HTTP_HOST" => Some("b".to_owned()),
            "STATOR_HTTP_PORT" => Some("2".to_owned()),
            "DYN_HTTP_PORT" => Some("4".to_owned()),
            _ => None,
        };
        let cli = cli(&["--config", file.to_str().unwrap(), "--port", "3"]);
        let config = load(&cli, environment).unwrap();
        assert_eq!(config.http_host, "b");
        assert_eq!(config.http_port, 3);
        assert_eq!(config.idle_timeout, Duration::from_secs(5));
    }

    #[test]
    fn an_unknown_key_in_the_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("processor.toml");
        std::fs::write(&file, "http_prot = 1\n").unwrap();
        let error = load(&cli(&["--config", file.to_str().unwrap()]), no_environment).unwrap_err();
        assert!(error.to_string().contains("http_prot"), "{error}");
    }

    #[test]
    fn a_bad_value_in_the_environment_is_refused_by_name() {
        let environment = |name: &str| (name == "DYN_ROUTER_MODE").then(|| "best".to_owned());
        let error = load(&cli(&[]), environment).unwrap_err().to_string();
        assert!(
            error.contains("best") && error.contains("--router-mode"),
            "{error}"
        );
    }

    #[test]
    fn routing_that_is_not_there_yet_is_refused_in_words() {
        let parsed = Cli::try_parse_from(["stator-processor", "--router-mode", "kv"]);
        let error = parsed.unwrap_err().to_string();
        assert!(error.contains("not there yet"), "{error}");
    }

    #[test]
    fn keys_come_from_flags_and_file_and_are_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# staff\nsecret-c\n\n  secret-d  \n").unwrap();
        let arguments = [
            "--api-key=secret-a,secret-b",
            "--api-key-file",
            file.to_str().unwrap(),
        ];
        let config = load(&cli(&arguments), no_environment).unwrap();
        let keys: Vec<_> = config.api_key.iter().map(Secret::reveal).collect();
        assert_eq!(keys, ["secret-a", "secret-b", "secret-c", "secret-d"]);
        assert!(!to_toml(&config).unwrap().contains("secret-"));
        assert!(!format!("{config:?}").contains("secret-"));
    }

    #[test]
    fn a_key_file_without_keys_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# none\n").unwrap();
        let cli = cli(&["--api-key-file", file.to_str().unwrap()]);
        assert!(matches!(
            load(&cli, no_environment),
            Err(ConfigError::NoKeys { .. })
        ));
    }

    #[test]
    fn a_certificate_without_its_key_is_refused() {
        let cli = cli(&["--tls-cert-path", "cert.pem"]);
        assert!(matches!(
            load(&cli, no_environment),
            Err(ConfigError::Contradiction(_))
        ));
    }

    #[test]
    fn every_variable_belongs_to_a_flag_and_is_in_the_help() {
        let help = command().render_long_help().to_string();
        for (_, names) in ENVIRONMENT {
            for name in *names {
                assert!(help.contains(name), "{name}");
            }
        }
    }

    #[test]
    fn what_is_printed_can_be_loaded() {
        let printed = to_toml(&Config::default()).unwrap();
        assert_eq!(
            toml::from_str::<Config>(&printed).unwrap(),
            Config::default()
        );
    }
}
