//! Where each setting comes from: the command line, else the environment, else the file, else the default.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::FromArgMatches;
use stator_common::{
    card::{self, Role},
    settings::{self, SecretError},
};
use stator_engine::{
    flags::Given,
    handoff::{ShortName, TransferError},
};

use super::Config;
use crate::{
    cli::{self, Cli, ENVIRONMENT, EngineKind, EventPlane, Settings},
    launch,
    python::{self, PythonError},
};

/// Why the configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("parse {path}: {source}")]
    Parse {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("from the environment: {0}")]
    Environment(clap::Error),
    #[error("{0}")]
    Value(Box<toml::de::Error>),
    #[error("settings cannot be merged: {0}")]
    Merge(Box<toml::ser::Error>),
    #[error("which model? Name a folder or a Hugging Face id as the first argument")]
    NoModel,
    #[error("'{0}' is no name for a place: letters, digits, '-' and '_' only")]
    Name(String),
    #[error("--engine {0} and --engine-attach contradict each other")]
    Attach(&'static str),
    #[error(
        "--engine-keep is not for the data-parallel ranks of a mixture of experts: they end with the worker that \
         coordinates them"
    )]
    KeepLockstep,
    #[error("--engine attach needs --engine-attach tcp://host:port")]
    NoAttach,
    #[error(transparent)]
    Token(#[from] SecretError),
    #[error(
        "--host {0} is open to other machines: name a secret with --plane-token-file (or STATOR_PLANE_TOKEN), \
         or say --insecure-plane"
    )]
    OpenPlane(String),
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(
        "a {role} worker needs a connector that hands KV from engine to engine{}: say {}",
        has(.found), remedy(.names)
    )]
    NoHandOff {
        role: Role,
        /// vLLM's names of what there is instead.
        found: Vec<String>,
        names: Vec<ShortName>,
    },
    #[error("{flag} means a {meant} worker, and this is stator-{role}: run stator-{meant}")]
    OtherRole {
        flag: &'static str,
        meant: Role,
        role: Role,
    },
    #[error("{0} means an encode worker, which this version does not have")]
    NoEncode(&'static str),
    #[error("--event-plane nats: this version has no NATS; say --event-plane zmq, or leave it out")]
    Nats,
    #[error("--headless is a further node of an engine: {0}")]
    Headless(&'static str),
    #[error(
        "--connector {} and --kv-transfer-config contradict each other: leave out one of them{}",
        list(.names), stands_for(.meaning)
    )]
    TwoConnectors {
        names: Vec<ShortName>,
        meaning: Option<String>,
    },
    #[error(
        "--connector {} contradicts itself: say --connector none, or leave `none` out",
        list(.0)
    )]
    NoneAndOthers(Vec<ShortName>),
}

fn list(names: &[ShortName]) -> String {
    let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
    names.join(",")
}

fn has(found: &[String]) -> String {
    match found {
        [] => String::new(),
        found => format!(", and {} does not", found.join(" with ")),
    }
}

fn remedy(names: &[ShortName]) -> String {
    let others = names.iter().filter(|name| **name != ShortName::None);
    let names: Vec<ShortName> = others.copied().chain([ShortName::Nixl]).collect();
    format!("--connector {}", list(&names))
}

fn stands_for(meaning: &Option<String>) -> String {
    meaning.as_ref().map_or_else(String::new, |json| {
        format!(" (--connector stands for --kv-transfer-config '{json}')")
    })
}

/// Loads the configuration: command line over environment over file over default.
///
/// - `environment`: looks a variable up (`std::env::var(..).ok()` outside tests).
///
/// # Errors
/// [`ConfigError`].
pub fn load(
    cli: &Cli,
    role: Role,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Config, ConfigError> {
    let mut merged = match &cli.config {
        Some(path) => read_toml(path)?,
        None => toml::Table::new(),
    };
    merged.extend(layer(&environment_settings(role, environment)?)?);
    merged.extend(layer(&cli.settings)?);
    let mut config: Config = merged
        .try_into()
        .map_err(|error| ConfigError::Value(Box::new(error)))?;
    config.vllm = cli.vllm.clone();
    config.plane_token = settings::plane_token(config.plane_token_file.as_deref(), environment)?;
    if config.engine_kind() == EngineKind::Vllm {
        config.python = Some(python::find(config.python.take(), environment)?);
    }
    check(&config, role)?;
    Ok(config)
}

/// Writes the configuration as TOML that [`load`] reads.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

fn check(config: &Config, role: Role) -> Result<(), ConfigError> {
    if config.model.is_empty() {
        return Err(ConfigError::NoModel);
    }
    check_role(config, role)?;
    config.transfer(role)?;
    config.handoff(role)?;
    if config.event_plane == EventPlane::Nats {
        return Err(ConfigError::Nats);
    }
    if config.headless {
        check_headless(config)?;
    }
    if config.engine_keep && launch::steps_together(config) {
        return Err(ConfigError::KeepLockstep);
    }
    let place = config.place(role);
    for name in [place.namespace, place.component, place.endpoint] {
        if !card::is_name(&name) {
            return Err(ConfigError::Name(name));
        }
    }
    match (config.engine_kind(), &config.engine_attach) {
        (EngineKind::Vllm, Some(_)) => Err(ConfigError::Attach("vllm")),
        (EngineKind::Sim, Some(_)) => Err(ConfigError::Attach("sim")),
        (EngineKind::Attach, None) => Err(ConfigError::NoAttach),
        (EngineKind::Attach, Some(_)) | (EngineKind::Vllm | EngineKind::Sim, None) => Ok(()),
    }
}

/// Refuses flags that mean another kind of worker than this program is.
fn check_role(config: &Config, role: Role) -> Result<(), ConfigError> {
    let meant = [
        config
            .disaggregation_mode
            .map(|mode| ("--disaggregation-mode", mode.role())),
        config
            .is_prefill_worker
            .then_some(("--is-prefill-worker", Role::Prefill)),
        config
            .is_decode_worker
            .then_some(("--is-decode-worker", Role::Decode)),
    ];
    match meant
        .into_iter()
        .flatten()
        .find(|(_, meant)| *meant != role)
    {
        Some((flag, Role::Encode)) => Err(ConfigError::NoEncode(flag)),
        Some((flag, meant)) => Err(ConfigError::OtherRole { flag, meant, role }),
        None => Ok(()),
    }
}

/// Refuses what a further node of an engine has no use for, or cannot be.
fn check_headless(config: &Config) -> Result<(), ConfigError> {
    let given = Given::read(&config.engine_args);
    let number = |name| given.value(name).and_then(|text| text.parse::<u32>().ok());
    let why = if config.engine_kind() != EngineKind::Vllm {
        "it runs vLLM, and --engine names another"
    } else if config.engine_keep {
        "it has nothing that a later worker could take over: leave out --engine-keep"
    } else if config.data_parallel_size > 1 {
        "each engine has its own nodes: leave out --data-parallel-size and start one for each engine"
    } else if number("nnodes").unwrap_or(1) < 2 || number("node-rank").unwrap_or(0) == 0 {
        "say which node of which engine it is: --nnodes N --node-rank R --master-addr HOST, R at least 1 \
         (node 0 is started without --headless)"
    } else {
        return Ok(());
    };
    Err(ConfigError::Headless(why))
}

fn read_toml(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    text.parse().map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// Turns variables into flags, so that both are parsed and refused alike.
fn environment_settings(
    role: Role,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Settings, ConfigError> {
    cli::command(role)
        .try_get_matches_from(ENVIRONMENT.command_line(environment))
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map(|cli| cli.settings)
        .map_err(ConfigError::Environment)
}

fn layer(settings: &Settings) -> Result<toml::Table, ConfigError> {
    toml::Table::try_from(settings).map_err(|error| ConfigError::Merge(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use stator_common::settings::Secret;

    use super::*;

    fn loaded(line: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let environment = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        load(
            &cli::parse(Role::Agg, &argv, &environment).unwrap(),
            Role::Agg,
            &environment,
        )
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("worker.toml");
        fs::write(&file, "namespace = 'file'\nport = 1\nsystem_port = 1\n").unwrap();
        let line = format!(
            "stator-agg /m --engine sim --port 3 --config {}",
            file.display()
        );
        let config = loaded(&line, &[("DYN_NAMESPACE", "env"), ("STATOR_PORT", "2")]).unwrap();
        assert_eq!(config.namespace, "env");
        assert_eq!(config.port, 3);
        assert_eq!(config.system_port, 1);
    }

    #[test]
    fn what_is_printed_can_be_read() {
        let line =
            "stator-agg /m --engine sim --endpoint dyn://a.b.c --drain-grace 5 --max-model-len 64";
        let config = loaded(line, &[]).unwrap();
        let text = to_toml(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
        assert_eq!(config.place(Role::Agg).to_string(), "dyn://a.b.c");
    }

    #[test]
    fn the_secret_is_not_printed() {
        let config = loaded(
            "stator-agg /m --engine sim",
            &[("STATOR_PLANE_TOKEN", "s3cret")],
        )
        .unwrap();
        assert_eq!(config.plane_token, Some(Secret::from("s3cret")));
        assert!(!to_toml(&config).unwrap().contains("s3cret"));
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn an_empty_token_is_none() {
        let config = loaded("stator-agg /m --engine sim", &[("STATOR_PLANE_TOKEN", "")]);
        assert_eq!(config.unwrap().plane_token, None);
    }

    #[test]
    fn an_unknown_key_of_the_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("worker.toml");
        fs::write(&file, "naemspace = 'x'\n").unwrap();
        let line = format!("stator-agg /m --engine sim --config {}", file.display());
        let error = loaded(&line, &[]).unwrap_err();
        assert!(error.to_string().contains("naemspace"), "{error}");
    }

    #[test]
    fn a_connector_by_its_short_name_stands_for_vllms_flag() {
        let line = "stator-agg /m --engine sim --connector kvbm,nixl";
        let config = loaded(line, &[]).unwrap();
        let transfer = config.transfer(Role::Prefill).unwrap().unwrap();
        assert_eq!(transfer.connectors(), ["DynamoConnector", "NixlConnector"]);
        let config = loaded("stator-agg /m --engine sim", &[("DYN_CONNECTOR", "none")]).unwrap();
        assert_eq!(config.transfer(Role::Agg).unwrap(), None);
    }

    #[test]
    fn a_role_without_a_hand_off_is_told_the_flag_that_works() {
        let config = |line: &str| loaded(line, &[]).unwrap();
        for (line, remedy) in [
            (
                "stator-agg /m --engine sim",
                "engine to engine: say --connector nixl",
            ),
            (
                "stator-agg /m --engine sim --connector kvbm",
                "and DynamoConnector does not: say --connector kvbm,nixl",
            ),
            (
                "stator-agg /m --engine sim --connector none",
                "say --connector nixl",
            ),
            (
                "stator-agg /m --engine sim --kv-transfer-config.kv_connector OffloadingConnector",
                "and OffloadingConnector does not: say --connector nixl",
            ),
        ] {
            let error = config(line).handoff(Role::Decode).unwrap_err().to_string();
            assert!(error.contains(remedy), "{error}");
            assert!(config(line).handoff(Role::Agg).unwrap().is_none());
        }
        let both = "stator-agg /m --engine sim --connector nixl --kv-transfer-config {\"kv_connector\":\"X\"}";
        let error = loaded(both, &[]).unwrap_err().to_string();
        assert!(error.contains("--kv-transfer-config '{"), "{error}");
        let error = loaded("stator-agg /m --engine sim --connector none,nixl", &[]);
        assert!(matches!(error, Err(ConfigError::NoneAndOthers(_))));
    }

    #[test]
    fn a_flag_that_means_another_kind_of_worker_names_its_program() {
        let role = |line: &str, variables: &[(&str, &str)]| loaded(line, variables);
        for (line, program) in [
            (
                "stator-agg /m --engine sim --is-prefill-worker",
                "run stator-prefill",
            ),
            (
                "stator-agg /m --engine sim --is-decode-worker",
                "run stator-decode",
            ),
            (
                "stator-agg /m --engine sim --disaggregation-mode decode",
                "run stator-decode",
            ),
            (
                "stator-agg /m --engine sim --disaggregation-mode encode",
                "does not have",
            ),
        ] {
            let error = role(line, &[]).unwrap_err().to_string();
            assert!(error.contains(program), "{error}");
        }
        let plain = "stator-agg /m --engine sim";
        assert!(role(plain, &[("DYN_VLLM_DISAGGREGATION_MODE", "prefill")]).is_err());
        for mode in ["agg", "pd"] {
            assert!(role(plain, &[("DYN_VLLM_DISAGGREGATION_MODE", mode)]).is_ok());
        }
    }

    #[test]
    fn old_spellings_work_and_are_named_once() {
        let line = "stator-agg /m --engine sim --store-kv=file --is-prefill-worker=false";
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let cli = cli::parse(Role::Agg, &argv, &|_| None);
        let old: Vec<_> = cli
            .unwrap()
            .deprecated
            .iter()
            .map(|renamed| renamed.old)
            .collect();
        assert_eq!(old, ["--store-kv", "--is-prefill-worker"]);
    }

    #[test]
    fn a_headless_node_says_which_node_it_is() {
        let config = |line: &str| {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            Config {
                model: "/m".to_owned(),
                headless: true,
                engine_args: args,
                ..Config::default()
            }
        };
        let node = "--nnodes 2 --node-rank 1 --master-addr h";
        assert!(check(&config(node), Role::Agg).is_ok());
        for line in ["", "--nnodes 2 --node-rank 0", "--node-rank 1"] {
            let error = check(&config(line), Role::Agg).unwrap_err().to_string();
            assert!(error.contains("--node-rank R"), "{error}");
        }
        let kept = Config {
            engine_keep: true,
            ..config(node)
        };
        assert!(check(&kept, Role::Agg).is_err());
        assert!(loaded("stator-agg /m --engine sim --event-plane nats", &[]).is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "stator-agg --engine sim",
            "stator-agg /m --engine sim --engine-attach tcp://127.0.0.1:1",
            "stator-agg /m --engine attach",
            "stator-agg /m --engine sim --namespace a/b",
        ] {
            assert!(loaded(line, &[]).is_err(), "{line}");
        }
    }
}
