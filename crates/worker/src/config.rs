//! What can be set on a worker: command line over environment over file over default.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::FromArgMatches;
use serde::{Deserialize, Serialize};
use stator_common::card::{self, Endpoint, Role};

use crate::{
    cli::{self, Cli, DiscoveryBackend, ENVIRONMENT, EngineKind, RequestPlane, Settings},
    python::{self, PythonError},
};

/// A worker's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Model folder or Hugging Face id. Must be set.
    pub model: String,
    /// Names that clients may use; the first is the model's id. Empty: `model`.
    pub served_model_name: Vec<String>,
    /// Jinja file (or, with a `{` in it, the template itself) in place of the model's chat template.
    pub chat_template: Option<String>,
    /// Finds tool calls in the output. Absent: tools are not parsed.
    pub tool_call_parser: Option<String>,
    /// Tells thoughts from answers; goes to the engine too. Absent: no reasoning.
    pub reasoning_parser: Option<String>,
    /// The same, for the output alone; wins over `reasoning_parser` there.
    pub dyn_reasoning_parser: Option<String>,
    /// Without effect; accepted because vLLM has it.
    pub enable_auto_tool_choice: bool,

    /// Keeps deployments apart. Default `dynamo`, as Dynamo's.
    pub namespace: String,
    /// Kind of worker. Absent: by role (`backend` for aggregated and decode workers).
    pub component_name: Option<String>,
    /// Function of the worker. Default `generate`.
    pub endpoint_name: String,
    /// All three at once; wins over them. `dyn://namespace.component.endpoint`.
    #[serde(with = "as_text", skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// Where the worker makes itself known. Default `file`.
    pub discovery_backend: DiscoveryBackend,
    /// Folder of the file discovery. Absent: the default that processors use too.
    pub discovery_path: Option<PathBuf>,

    /// How requests come. Default `tcp`.
    pub request_plane: RequestPlane,
    /// Address to take requests on. Default 127.0.0.1: this machine only.
    pub host: String,
    /// Port to take requests on. 0, the default, takes a free one.
    pub port: u16,
    /// Host under which processors reach this worker. Absent: `host`, or this machine's address if
    /// that is a wildcard.
    pub advertise_host: Option<String>,
    /// File with the secret that processors must present. Absent: none is asked for.
    pub plane_token_file: Option<PathBuf>,
    /// Whether a listener beyond loopback may go without a secret. Default false.
    pub insecure_plane: bool,
    /// Address of the system routes. Default 127.0.0.1.
    pub system_host: String,
    /// Port of the system routes; 0 takes a free one, -1 (the default) means none.
    pub system_port: i32,

    /// What computes. Absent: `attach` if `engine_attach` is set, else `vllm`.
    pub engine: Option<EngineKind>,
    /// Where the handshake of an engine that is started elsewhere arrives, `tcp://host:port`.
    pub engine_attach: Option<String>,
    /// Host under which such an engine reaches this worker. Absent: the host of `engine_attach`.
    pub engine_advertise_host: Option<String>,
    /// The simulated engine's program. Absent: `stator-sim` beside this one, or on the path.
    pub engine_command: Option<PathBuf>,
    /// Python with vLLM. Absent: that of `VLLM_VENV`, `VIRTUAL_ENV`, `./.venv`, or `python3`.
    pub python: Option<PathBuf>,
    /// Whether the engine outlives this worker, to be taken over by the next one. Default false.
    pub engine_keep: bool,
    /// The engine's folder. Absent: one below the temporary folder, by namespace, component and
    /// model if the engine is kept, else this worker's own.
    pub run_dir: Option<PathBuf>,
    /// Independent engines of this worker. Default 1.
    pub data_parallel_size: u32,
    /// Whether a vLLM outside the tested versions is accepted. Default false.
    pub any_vllm_version: bool,
    /// Time for an engine to become ready. Default 10 min, vLLM's own.
    #[serde(with = "humantime_serde")]
    pub engine_ready_timeout: Duration,
    /// vLLM's flags, verbatim.
    pub engine_args: Vec<String>,

    /// Time that running requests get to finish after SIGTERM. Default 30 s; zero cuts them off.
    #[serde(with = "humantime_serde")]
    pub drain_grace: Duration,

    /// The secret itself, once it is read. Never written.
    #[serde(skip)]
    pub plane_token: Option<Secret>,
}

/// A value that is never printed or logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<hidden>")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: String::new(),
            served_model_name: Vec::new(),
            chat_template: None,
            tool_call_parser: None,
            reasoning_parser: None,
            dyn_reasoning_parser: None,
            enable_auto_tool_choice: false,
            namespace: "dynamo".to_owned(),
            component_name: None,
            endpoint_name: "generate".to_owned(),
            endpoint: None,
            discovery_backend: DiscoveryBackend::File,
            discovery_path: None,
            request_plane: RequestPlane::Tcp,
            host: "127.0.0.1".to_owned(),
            port: 0,
            advertise_host: None,
            plane_token_file: None,
            insecure_plane: false,
            system_host: "127.0.0.1".to_owned(),
            system_port: -1,
            engine: None,
            engine_attach: None,
            engine_advertise_host: None,
            engine_command: None,
            python: None,
            engine_keep: false,
            run_dir: None,
            data_parallel_size: 1,
            any_vllm_version: false,
            engine_ready_timeout: Duration::from_secs(600),
            engine_args: Vec::new(),
            drain_grace: Duration::from_secs(30),
            plane_token: None,
        }
    }
}

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
    #[error("--engine attach needs --engine-attach tcp://host:port")]
    NoAttach,
    #[error("{0} holds no secret")]
    EmptyToken(PathBuf),
    #[error(
        "--host {0} is open to other machines: name a secret with --plane-token-file (or STATOR_PLANE_TOKEN), \
         or say --insecure-plane"
    )]
    OpenPlane(String),
    #[error(transparent)]
    Python(#[from] PythonError),
}

/// Loads the configuration: command line over environment over file over default.
///
/// - `environment`: looks a variable up (`std::env::var(..).ok()` outside tests).
///
/// # Errors
/// [`ConfigError`].
pub fn load(
    cli: &Cli,
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Config, ConfigError> {
    let mut merged = match &cli.config {
        Some(path) => read_toml(path)?,
        None => toml::Table::new(),
    };
    merged.extend(layer(&environment_settings(environment)?)?);
    merged.extend(layer(&cli.settings)?);
    let mut config: Config = merged
        .try_into()
        .map_err(|error| ConfigError::Value(Box::new(error)))?;
    config.plane_token = match &config.plane_token_file {
        Some(path) => Some(read_token(path)?),
        None => environment("STATOR_PLANE_TOKEN").map(Secret),
    };
    if config.engine_kind() == EngineKind::Vllm {
        config.python = Some(python::find(config.python.take(), environment)?);
    }
    config.check()?;
    Ok(config)
}

/// Writes the configuration as TOML that [`load`] reads.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
}

impl Config {
    /// Returns what computes.
    pub fn engine_kind(&self) -> EngineKind {
        match (self.engine, &self.engine_attach) {
            (Some(kind), _) => kind,
            (None, Some(_)) => EngineKind::Attach,
            (None, None) => EngineKind::Vllm,
        }
    }

    /// Returns where the worker belongs.
    pub fn place(&self, role: Role) -> Endpoint {
        self.endpoint.clone().unwrap_or_else(|| Endpoint {
            namespace: self.namespace.clone(),
            component: self.component_name.clone().unwrap_or_else(|| {
                // Dynamo's names, which dashboards and scripts know.
                match role {
                    Role::Agg | Role::Decode => "backend",
                    Role::Prefill => "prefill",
                    Role::Encode => "encode",
                }
                .to_owned()
            }),
            endpoint: self.endpoint_name.clone(),
        })
    }

    /// Returns the names that clients may use, the id first.
    pub fn names(&self) -> Vec<String> {
        if self.served_model_name.is_empty() {
            vec![self.model.clone()]
        } else {
            self.served_model_name.clone()
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.model.is_empty() {
            return Err(ConfigError::NoModel);
        }
        let place = self.place(Role::Agg);
        for name in [place.namespace, place.component, place.endpoint] {
            if !card::is_name(&name) {
                return Err(ConfigError::Name(name));
            }
        }
        match (self.engine_kind(), &self.engine_attach) {
            (EngineKind::Vllm, Some(_)) => Err(ConfigError::Attach("vllm")),
            (EngineKind::Sim, Some(_)) => Err(ConfigError::Attach("sim")),
            (EngineKind::Attach, None) => Err(ConfigError::NoAttach),
            (EngineKind::Attach, Some(_)) | (EngineKind::Vllm | EngineKind::Sim, None) => Ok(()),
        }
    }
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

fn read_token(path: &Path) -> Result<Secret, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    match text.trim() {
        "" => Err(ConfigError::EmptyToken(path.to_owned())),
        token => Ok(Secret(token.to_owned())),
    }
}

/// Turns variables into flags, so that both are parsed and refused alike.
fn environment_settings(
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Settings, ConfigError> {
    let flags = ENVIRONMENT.iter().filter_map(|(flag, _)| {
        let value = cli::from_environment(flag, environment)?;
        Some(format!("--{flag}={value}"))
    });
    let argv = ["environment".to_owned()].into_iter().chain(flags);
    cli::command()
        .try_get_matches_from(argv)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map(|cli| cli.settings)
        .map_err(ConfigError::Environment)
}

fn layer(settings: &Settings) -> Result<toml::Table, ConfigError> {
    toml::Table::try_from(settings).map_err(|error| ConfigError::Merge(Box::new(error)))
}

/// An endpoint as it is written: `dyn://namespace.component.endpoint`.
pub(crate) mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use stator_common::card::Endpoint;

    pub(crate) fn serialize<S: Serializer>(
        endpoint: &Option<Endpoint>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match endpoint {
            Some(endpoint) => serializer.collect_str(endpoint),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Endpoint>, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Some).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn loaded(line: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let environment = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        load(&cli::parse(&argv, &environment).unwrap(), &environment)
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
        assert_eq!(config.plane_token, Some(Secret("s3cret".to_owned())));
        assert!(!to_toml(&config).unwrap().contains("s3cret"));
        assert!(!format!("{config:?}").contains("s3cret"));
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
