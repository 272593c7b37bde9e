//! What can be set on a processor, and where each setting comes from.
//!
//! One [`Settings`] holds what a person may say, each field optional. It is read three times: from the
//! file, from the environment (turned into flags, so that both are parsed and refused alike) and from
//! the command line; the later one wins, and [`Config`] holds the result with the defaults filled in.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde::{Deserialize, Serialize};

use crate::pool::RouterMode;

/// Flags that the environment may give, and the names it may use, the first one set winning.
///
/// The `DYN_*` names are Dynamo's (frontend, 1.6).
const ENVIRONMENT: &[(&str, &[&str])] = &[
    ("http-host", &["STATOR_HTTP_HOST", "DYN_HTTP_HOST"]),
    ("http-port", &["STATOR_HTTP_PORT", "DYN_HTTP_PORT"]),
    ("namespace", &["STATOR_NAMESPACE", "DYN_NAMESPACE"]),
    (
        "discovery-backend",
        &[
            "STATOR_DISCOVERY_BACKEND",
            "DYN_DISCOVERY_BACKEND",
            "DYN_STORE_KV",
        ],
    ),
    ("discovery-path", &["STATOR_DISCOVERY_PATH", "DYN_FILE_KV"]),
    ("router-mode", &["STATOR_ROUTER_MODE", "DYN_ROUTER_MODE"]),
    ("api-key", &["STATOR_API_KEY"]),
    ("api-key-file", &["STATOR_API_KEY_FILE"]),
    ("metrics-auth", &["STATOR_METRICS_AUTH"]),
    (
        "tls-cert-path",
        &["STATOR_TLS_CERT_PATH", "DYN_TLS_CERT_PATH"],
    ),
    ("tls-key-path", &["STATOR_TLS_KEY_PATH", "DYN_TLS_KEY_PATH"]),
    ("max-body-bytes", &["STATOR_MAX_BODY_BYTES"]),
    ("header-timeout", &["STATOR_HEADER_TIMEOUT"]),
    ("body-timeout", &["STATOR_BODY_TIMEOUT"]),
    ("idle-timeout", &["STATOR_IDLE_TIMEOUT"]),
    ("drain-grace", &["STATOR_DRAIN_GRACE"]),
    (
        "trust-request-chat-template",
        &["STATOR_TRUST_REQUEST_CHAT_TEMPLATE"],
    ),
    (
        "reasoning-field-name",
        &["STATOR_REASONING_FIELD_NAME", "DYN_REASONING_FIELD_NAME"],
    ),
];

/// The OpenAI-compatible front of Stator: validates, tokenizes, routes to workers, streams the answers.
#[derive(Debug, Parser)]
#[command(name = "stator-processor", version, max_term_width = 100)]
pub struct Cli {
    /// Reads settings from this TOML file; its keys are the names below with underscores.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Prints the configuration that results from file, environment and flags, and ends.
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,

    /// The settings that flags, environment and file have in common.
    #[command(flatten)]
    pub settings: Settings,
}

/// What a person may set. Absent fields leave the choice to the layer below.
#[derive(Debug, Default, clap::Args, Serialize)]
pub struct Settings {
    /// Address or name to listen on [default: 127.0.0.1].
    #[arg(long, alias = "host", value_name = "HOST", help_heading = "Listener")]
    http_host: Option<String>,

    /// Port to listen on; 0 takes a free one [default: 8000].
    #[arg(long, alias = "port", value_name = "PORT", help_heading = "Listener")]
    http_port: Option<u16>,

    /// Certificate chain (PEM); with --tls-key-path the listener speaks TLS only. Read again when it changes.
    #[arg(long, value_name = "FILE", help_heading = "Listener")]
    tls_cert_path: Option<PathBuf>,

    /// Private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", help_heading = "Listener")]
    tls_key_path: Option<PathBuf>,

    /// Key that clients must send as `Authorization: Bearer KEY`; may be given several times. Other
    /// processes of this machine can see flags: prefer a file or the environment.
    #[arg(
        long,
        value_name = "KEY",
        value_delimiter = ',',
        help_heading = "Access"
    )]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "reveal")]
    api_key: Option<Vec<Secret>>,

    /// File with one key per line; empty lines and lines that start with # are skipped.
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    api_key_file: Option<PathBuf>,

    /// Asks for a key at /metrics and /workers too [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Access")]
    metrics_auth: Option<bool>,

    /// Largest request body in bytes; larger ones get 413 [default: 67108864].
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    max_body_bytes: Option<usize>,

    /// Time from a request's first byte to the end of its header [default: 15s].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    header_timeout: Option<Duration>,

    /// Longest pause while a request's body arrives [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    body_timeout: Option<Duration>,

    /// Time that a connection may stay open between two requests [default: 2m].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    idle_timeout: Option<Duration>,

    /// Time that running requests get to finish when the process is told to end [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    drain_grace: Option<Duration>,

    /// Uses the workers of this namespace only [default: those of every namespace].
    #[arg(long, value_name = "NAME", help_heading = "Workers")]
    namespace: Option<String>,

    /// How workers are found [default: file].
    #[arg(
        long,
        alias = "store-kv",
        value_name = "BACKEND",
        help_heading = "Workers"
    )]
    discovery_backend: Option<DiscoveryBackend>,

    /// Folder of the file discovery [default: one per user under the temporary folder].
    #[arg(long, alias = "file-kv", value_name = "DIR", help_heading = "Workers")]
    discovery_path: Option<PathBuf>,

    /// How a worker is chosen for a request [default: round-robin].
    #[arg(long, alias = "router", value_name = "MODE", help_heading = "Workers")]
    router_mode: Option<RouterMode>,

    /// Name of the field that carries a reasoning model's thoughts [default: reasoning_content].
    #[arg(long, value_name = "NAME", help_heading = "Answers")]
    reasoning_field_name: Option<ReasoningField>,

    /// Lets requests bring chat templates of their own; only for clients that are trusted [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Answers")]
    trust_request_chat_template: Option<bool>,
}

/// A processor's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address or name to listen on. Default 127.0.0.1: this machine only.
    pub http_host: String,
    /// Port to listen on. 0 takes a free one. Default 8000.
    pub http_port: u16,
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
            tls_cert_path: None,
            tls_key_path: None,
            api_key: Vec::new(),
            api_key_file: None,
            metrics_auth: false,
            max_body_bytes: 64 << 20,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            drain_grace: Duration::from_secs(30),
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

/// Writes secrets in full: between two layers of settings, never to a person.
fn reveal<S: serde::Serializer>(
    secrets: &Option<Vec<Secret>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(secrets.iter().flatten().map(Secret::reveal))
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
    Environment(clap::Error),
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

impl Cli {
    /// Parses the process's arguments; `--help` and errors end the process, as clap does.
    pub fn from_process() -> Self {
        let matches = command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Returns the command with the names that the environment may use written into the help.
pub fn command() -> clap::Command {
    let mut command = Cli::command();
    for (flag, names) in ENVIRONMENT {
        let id = flag.replace('-', "_");
        command = command.mut_arg(id, |arg| {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg.help(format!("{help} [env: {}]", names.join(", ")))
        });
    }
    command
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
    merged.extend(layer(&from_environment(environment)?));
    merged.extend(layer(&cli.settings));
    let mut config: Config = merged.try_into().map_err(ConfigError::Value)?;
    if config.tls_cert_path.is_some() != config.tls_key_path.is_some() {
        return Err(ConfigError::Contradiction(
            "tls_cert_path and tls_key_path go together: give both or neither",
        ));
    }
    if let Some(path) = config.api_key_file.clone() {
        config.api_key.extend(read_keys(&path)?);
    }
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

fn from_environment(environment: impl Fn(&str) -> Option<String>) -> Result<Settings, ConfigError> {
    let mut arguments = vec!["environment".to_owned()];
    for (flag, names) in ENVIRONMENT {
        let value = names
            .iter()
            .filter_map(|name| environment(name))
            .find(|v| !v.is_empty());
        arguments.extend(value.map(|value| format!("--{flag}={value}")));
    }
    let cli = Cli::try_parse_from(arguments).map_err(ConfigError::Environment)?;
    Ok(cli.settings)
}

fn layer(settings: &Settings) -> toml::Table {
    toml::Table::try_from(settings).expect("settings hold only what TOML can say")
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
    use super::*;

    fn cli(arguments: &[&str]) -> Cli {
        Cli::try_parse_from(std::iter::once(&"stator-processor").chain(arguments)).unwrap()
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
