//! Where each setting comes from: the command line, else the environment, else the file, else the default.

use std::path::{Path, PathBuf};

use stator_common::settings::{
    self, EventPlane, FileError, NatsSettingsError, Secret, SecretError,
};

use super::cli::{self, Cli};
use super::{ConditionalMode, Config};
use crate::fleet::PrefillDispatch;

/// Why the configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file of keys could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file of settings cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
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
    /// A file of a secret gives none.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// How the NATS server is reached does not go together.
    #[error(transparent)]
    Nats(#[from] NatsSettingsError),
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
    let mut merged = settings::read_file(cli.config.as_deref())?;
    settings::overlay(
        &mut merged,
        cli::layer(&cli::from_environment(&environment)?),
    );
    settings::overlay(&mut merged, cli::layer(&cli.settings));
    let mut config: Config = merged.try_into().map_err(ConfigError::Value)?;
    let defaults = Config::default();
    if config.tls_cert_path.is_some() != config.tls_key_path.is_some() {
        return Err(ConfigError::Contradiction(
            "tls_cert_path and tls_key_path go together: give both or neither",
        ));
    }
    let tls = &config.request_plane_tls;
    let is_told_more =
        tls.cert.is_some() || tls.key.is_some() || config.request_plane_tls_name.is_some();
    if tls.ca.is_none() && is_told_more {
        return Err(ConfigError::Contradiction(
            "request_plane_tls_cert, _key and _name need request_plane_tls_ca, which workers are checked with",
        ));
    }
    let weights = [config.router_temperature, config.router_decode_weight];
    if weights
        .iter()
        .any(|weight| !(weight.is_finite() && *weight >= 0.0))
    {
        return Err(ConfigError::Contradiction(
            "router_temperature and router_decode_weight are numbers from 0 on",
        ));
    }
    let numbers = config
        .disagg_min_prefill_tokens
        .or(config.disagg_max_prefill_queue);
    match (config.conditional_disagg, numbers) {
        (Some(ConditionalMode::Fixed), None) => {
            return Err(ConfigError::Contradiction(
                "conditional_disagg = fixed needs disagg_min_prefill_tokens or disagg_max_prefill_queue",
            ));
        }
        (Some(ConditionalMode::Off | ConditionalMode::Auto), Some(_)) => {
            return Err(ConfigError::Contradiction(
                "disagg_min_prefill_tokens and disagg_max_prefill_queue count with conditional_disagg = fixed only",
            ));
        }
        (Some(_) | None, _) => {}
    }
    if let Some(path) = config.api_key_file.clone() {
        config.api_key.extend(read_keys(&path)?);
    }
    config.plane_token = settings::plane_token(config.plane_token_file.as_deref(), &environment)?;
    config.etcd.read_password(&environment)?;
    if config.event_plane == EventPlane::Nats {
        config.nats.complete(&environment)?;
        let listens = config.router_sync_host != defaults.router_sync_host
            || config.router_sync_port != defaults.router_sync_port;
        if listens {
            return Err(ConfigError::Contradiction(
                "router_sync_host and router_sync_port are where other processors hear this one by zmq: leave them out \
                 with event_plane = nats, or say zmq",
            ));
        }
    } else {
        // What others left in the environment counts once a worker is reached by it.
        config.nats.complete_if_used(&environment);
    }
    if config.prefill_dispatch == PrefillDispatch::Push
        && config.prefill_queue_limit != defaults.prefill_queue_limit
    {
        return Err(ConfigError::Contradiction(
            "prefill_queue_limit counts with prefill_dispatch = queue only: leave it out, or say queue",
        ));
    }
    if config.api_key.iter().any(|key| key.reveal().is_empty()) {
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

    use super::super::cli::{ENVIRONMENT, command};
    use std::time::Duration;

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
    fn certificates_of_the_request_plane_need_their_authority() {
        let load = |arguments: &[&str]| load(&cli(arguments), no_environment);
        let refused = load(&["--request-plane-tls-name", "worker"]).unwrap_err();
        assert!(refused.to_string().contains("request_plane_tls_ca"));
        let given = load(&["--request-plane", "http", "--request-plane-tls-ca", "/ca"]).unwrap();
        assert_eq!(given.request_plane_tls.ca, Some("/ca".into()));
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
    fn flags_without_effect_are_refused_with_the_remedy() {
        for (line, remedy) in [
            ("--prefill-queue-limit 5", "prefill_dispatch = queue"),
            ("--event-plane nats --router-sync-port 5600", "or say zmq"),
            (
                "--event-plane nats --router-sync-host 10.0.0.1",
                "or say zmq",
            ),
        ] {
            let line: Vec<&str> = line.split(' ').collect();
            let refused = load(&cli(&line), no_environment).unwrap_err().to_string();
            assert!(refused.contains(remedy), "{refused}");
        }
        let queued = ["--prefill-dispatch", "queue", "--prefill-queue-limit", "5"];
        assert!(load(&cli(&queued), no_environment).is_ok());
    }

    #[test]
    fn what_is_left_of_nats_in_the_environment_counts_only_where_it_is_used() {
        let environment = |name: &str| (name == "NATS_AUTH_USERNAME").then(|| "u".to_owned());
        let unused = load(&cli(&[]), environment).unwrap();
        let fault = unused.nats.fault.unwrap();
        assert!(fault.contains("--nats-password-file"), "{fault}");
        let refused = load(&cli(&["--event-plane", "nats"]), environment).unwrap_err();
        assert!(matches!(refused, ConfigError::Nats(_)), "{refused}");
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
    fn weights_below_zero_are_refused_wherever_they_come_from() {
        let parsed = Cli::try_parse_from(["stator-processor", "--router-temperature=-1"]);
        assert!(parsed.is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("processor.toml");
        std::fs::write(&file, "router_decode_weight = -0.5\n").unwrap();
        let error = load(&cli(&["--config", file.to_str().unwrap()]), no_environment).unwrap_err();
        assert!(matches!(error, ConfigError::Contradiction(_)), "{error}");
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
    fn an_empty_plane_token_is_none() {
        let environment = |name: &str| (name == "STATOR_PLANE_TOKEN").then(String::new);
        assert_eq!(load(&cli(&[]), environment).unwrap().plane_token, None);
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
        for (_, names) in ENVIRONMENT.rows() {
            for name in names {
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
