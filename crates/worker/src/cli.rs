//! The command line of a worker: our own flags in groups, a model, and any flag of vLLM.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use stator_common::card::Endpoint;
use stator_engine::{
    flags::{self, Arity, EngineFlag, FlagError},
    introspect::{self, IntrospectError},
};

use crate::python::{self, PythonError};

/// Flags that the environment may give, and the names it may use; the first one set wins.
///
/// The `DYN_*` names are Dynamo's (`dynamo.vllm`, 1.6).
pub(crate) const ENVIRONMENT: &[(&str, &[&str])] = &[
    ("namespace", &["STATOR_NAMESPACE", "DYN_NAMESPACE"]),
    ("endpoint", &["STATOR_ENDPOINT", "DYN_ENDPOINT"]),
    (
        "discovery-backend",
        &[
            "STATOR_DISCOVERY_BACKEND",
            "DYN_DISCOVERY_BACKEND",
            "DYN_STORE_KV",
        ],
    ),
    ("discovery-path", &["STATOR_FILE_KV", "DYN_FILE_KV"]),
    (
        "request-plane",
        &["STATOR_REQUEST_PLANE", "DYN_REQUEST_PLANE"],
    ),
    ("host", &["STATOR_HOST", "DYN_TCP_RPC_HOST"]),
    ("port", &["STATOR_PORT", "DYN_TCP_RPC_PORT"]),
    ("advertise-host", &["STATOR_ADVERTISE_HOST"]),
    ("plane-token-file", &["STATOR_PLANE_TOKEN_FILE"]),
    ("system-host", &["STATOR_SYSTEM_HOST", "DYN_SYSTEM_HOST"]),
    ("system-port", &["STATOR_SYSTEM_PORT", "DYN_SYSTEM_PORT"]),
    ("engine", &["STATOR_ENGINE"]),
    ("engine-command", &["STATOR_ENGINE_COMMAND"]),
    ("python", &["STATOR_PYTHON"]),
    ("run-dir", &["STATOR_RUN_DIR"]),
    (
        "tool-call-parser",
        &["STATOR_TOOL_CALL_PARSER", "DYN_TOOL_CALL_PARSER"],
    ),
    (
        "dyn-reasoning-parser",
        &["STATOR_REASONING_PARSER", "DYN_REASONING_PARSER"],
    ),
    ("drain-grace", &["STATOR_DRAIN_GRACE"]),
];

/// A worker's command line, without the flags of vLLM.
#[derive(Debug, Parser)]
#[command(
    version,
    about = "A worker of Stator: drives a vLLM engine and takes requests from processors",
    max_term_width = 100,
    override_usage = "stator-agg MODEL [OPTIONS] [VLLM FLAGS]",
    disable_version_flag = true
)]
pub struct Cli {
    /// Reads settings from this TOML file; its keys are the names below with underscores, and
    /// `engine_args`, a list.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Prints the configuration that results from file, environment and flags, and ends.
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,

    /// Prints the version, and ends.
    #[arg(long, short = 'V', action = clap::ArgAction::Version, help_heading = "Configuration")]
    version: Option<bool>,

    /// What flags, environment and file have in common.
    #[command(flatten)]
    pub settings: Settings,
}

/// What a person may set. Absent fields leave the choice to the layer below.
#[derive(Clone, Debug, Default, clap::Args, Serialize)]
pub struct Settings {
    /// Model folder or Hugging Face id; the first argument without a dash, or --model.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,

    /// Names that clients may use for the model; the first is its id [default: MODEL].
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = "Model")]
    pub served_model_name: Option<Vec<String>>,

    /// Chat template, a Jinja file, in place of the model's own.
    #[arg(
        long,
        alias = "custom-jinja-template",
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub chat_template: Option<String>,

    /// Finds tool calls in the model's output.
    #[arg(
        long,
        alias = "dyn-tool-call-parser",
        value_name = "NAME",
        help_heading = "Model"
    )]
    pub tool_call_parser: Option<String>,

    /// Tells thoughts from answers in the model's output; given to the engine too, which then leaves
    /// thoughts out of structured outputs.
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub reasoning_parser: Option<String>,

    /// The same for the output alone, where the engine's parser has another name or none.
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub dyn_reasoning_parser: Option<String>,

    /// Accepted as vLLM accepts it: tools are chosen by the model wherever there is a parser.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", hide = true)]
    pub enable_auto_tool_choice: Option<bool>,

    /// Keeps deployments apart [default: dynamo].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub namespace: Option<String>,

    /// Kind of worker [default: backend].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub component_name: Option<String>,

    /// Function of the worker [default: generate].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub endpoint_name: Option<String>,

    /// All three at once: dyn://namespace.component.endpoint.
    #[arg(long, value_name = "DYN", help_heading = "Place")]
    #[serde(with = "crate::config::as_text")]
    pub endpoint: Option<Endpoint>,

    /// Where the worker makes itself known [default: file].
    #[arg(
        long,
        alias = "store-kv",
        value_name = "BACKEND",
        help_heading = "Place"
    )]
    pub discovery_backend: Option<DiscoveryBackend>,

    /// Folder of the file discovery [default: stator-UID in the temporary folder].
    #[arg(long, alias = "file-kv", value_name = "DIR", help_heading = "Place")]
    pub discovery_path: Option<PathBuf>,

    /// How requests come [default: tcp].
    #[arg(long, value_name = "PLANE", help_heading = "Listeners")]
    pub request_plane: Option<RequestPlane>,

    /// Address to take requests on [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    pub host: Option<String>,

    /// Port to take requests on; 0 takes a free one [default: 0].
    #[arg(long, value_name = "PORT", help_heading = "Listeners")]
    pub port: Option<u16>,

    /// Host under which processors reach this worker [default: --host; of a wildcard, this machine's address].
    #[arg(long, value_name = "HOST", help_heading = "Listeners")]
    pub advertise_host: Option<String>,

    /// File with the secret that processors must present; needed beyond loopback.
    /// The variable STATOR_PLANE_TOKEN may hold the secret itself.
    #[arg(long, value_name = "FILE", help_heading = "Listeners")]
    pub plane_token_file: Option<PathBuf>,

    /// Takes requests beyond loopback from anybody.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Listeners")]
    pub insecure_plane: Option<bool>,

    /// Address of /health, /live, /status and /metrics [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    pub system_host: Option<String>,

    /// Port of /health, /live, /status and /metrics; 0 takes a free one, -1 none [default: -1].
    #[arg(long, value_name = "PORT", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-1..=65535), help_heading = "Listeners")]
    pub system_port: Option<i32>,

    /// What computes [default: vllm, or attach with --engine-attach].
    #[arg(long, value_name = "KIND", help_heading = "Engine")]
    pub engine: Option<EngineKind>,

    /// Only listens here (tcp://host:port); the engine is started elsewhere with `vllm serve --headless`
    /// and dials in. Data-parallel rank i listens on port + i.
    #[arg(long, value_name = "ADDRESS", help_heading = "Engine")]
    pub engine_attach: Option<String>,

    /// Host under which an engine started elsewhere reaches this worker.
    #[arg(long, value_name = "HOST", help_heading = "Engine")]
    pub engine_advertise_host: Option<String>,

    /// The simulated engine's program [default: stator-sim beside this one, or on the PATH].
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    pub engine_command: Option<PathBuf>,

    /// Python with vLLM [default: that of VLLM_VENV, VIRTUAL_ENV or ./.venv, or python3].
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    pub python: Option<PathBuf>,

    /// Lets the engine outlive this worker; the next one with the same --run-dir takes it over.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Engine")]
    pub engine_keep: Option<bool>,

    /// The engine's folder: endpoints, log, the record of a kept engine [default: one below the
    /// temporary folder].
    #[arg(long, value_name = "DIR", help_heading = "Engine")]
    pub run_dir: Option<PathBuf>,

    /// Independent engines of a dense model, each a target for routing [default: 1].
    #[arg(long, alias = "dp-size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256),
          help_heading = "Engine")]
    pub data_parallel_size: Option<u32>,

    /// Accepts a vLLM outside the versions that the wire was tested with.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Engine")]
    pub any_vllm_version: Option<bool>,

    /// Time for an engine to become ready [default: 10m].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Engine")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub engine_ready_timeout: Option<Duration>,

    /// Time that running requests get to finish when the worker is told to end [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "End")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub drain_grace: Option<Duration>,

    /// vLLM's flags, verbatim.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_args: Option<Vec<String>>,
}

/// Where a worker makes itself known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscoveryBackend {
    /// Files in a folder of this machine.
    File,
    /// This process's memory: for processors in the same process.
    Mem,
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestPlane {
    /// One multiplexed connection per processor (`proto/README.md`).
    Tcp,
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// vLLM, started by this worker.
    Vllm,
    /// The simulated engine, started by this worker.
    Sim,
    /// vLLM, started elsewhere.
    Attach,
}

/// Reads `30s`, `2m`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    }
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Ours: shown as clap does, and `--help` and `--version` too.
    #[error(transparent)]
    Own(#[from] clap::Error),
    #[error("{0}\n\nThe engine's own options are shown by: {1}")]
    Engine(FlagError, String),
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error(transparent)]
    Introspect(#[from] IntrospectError),
}

impl CliError {
    /// Shows it and ends the process: with status 0 after help, 2 after an error, as clap does.
    pub fn exit(&self) -> ! {
        match self {
            Self::Own(shown) => shown.exit(),
            Self::Engine(..) | Self::Python(_) | Self::Introspect(_) => {
                eprintln!("error: {self}");
                std::process::exit(2);
            }
        }
    }
}

/// Takes a command line apart. Our help needs no vLLM; everything else asks the installed one for its
/// flags, so that a wrong one is refused at once and not by an engine half a minute later.
///
/// - `argv`: with the program's name.
///
/// # Errors
/// [`CliError`].
pub fn parse(
    argv: &[OsString],
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Cli, CliError> {
    let own = command();
    let early = argv
        .iter()
        .skip(1)
        .take_while(|argument| *argument != "--")
        .any(|argument| {
            ["--help", "-h", "--version", "-V"]
                .iter()
                .any(|flag| argument == flag)
        });
    if early {
        let flag = argv.iter().skip(1).find(|argument| {
            ["--help", "-h", "--version", "-V"]
                .iter()
                .any(|flag| argument == flag)
        });
        own.try_get_matches_from(argv.first().into_iter().chain(flag))?;
    }
    let own = command();
    // A file that cannot be read is complained about when it is loaded.
    let file: toml::Table = flags::own_value(argv, "config")
        .and_then(|path| std::fs::read_to_string(path).ok()?.parse().ok())
        .unwrap_or_default();
    let value = |long: &str| {
        flags::own_value(argv, long)
            .map(|value| value.to_string_lossy().into_owned())
            .or_else(|| from_environment(long, environment))
            .or_else(|| Some(file.get(&long.replace('-', "_"))?.as_str()?.to_owned()))
    };
    let kind = value("engine");
    let attached = kind.as_deref() == Some("attach") || value("engine-attach").is_some();
    let (known, hint) = if kind.as_deref() == Some("sim") {
        let mut known = EngineFlag::built_in();
        known.extend(simulator_flags());
        (known, "stator-sim --help".to_owned())
    } else if attached {
        (EngineFlag::built_in(), "vllm serve --help=all".to_owned())
    } else {
        let python = python::find(value("python").map(PathBuf::from), environment)?;
        let hint = flags::help_command(&python);
        (introspect::introspect(&python)?.flags, hint)
    };
    let split = flags::split(argv.iter().cloned(), &own, &known)
        .map_err(|error| CliError::Engine(error, hint))?;
    let mut cli = Cli::from_arg_matches(&own.try_get_matches_from(split.own)?)?;
    cli.settings.model = split.model;
    cli.settings.engine_args = (!split.engine.is_empty()).then_some(split.engine);
    Ok(cli)
}

/// What only the simulated engine takes; `stator-sim` itself refuses what it does not know.
fn simulator_flags() -> impl Iterator<Item = EngineFlag> {
    [
        ("--sim-speedup", Arity::One),
        ("--sim-prefill-us-per-token", Arity::One),
        ("--sim-decode-us-per-step", Arity::One),
        ("--sim-decode-us-per-seq", Arity::One),
        ("--sim-transfer-us-per-token", Arity::One),
        ("--sim-load-ms", Arity::One),
        ("--sim-eos-one-in", Arity::One),
        ("--sim-wire-version", Arity::One),
        ("--sim-wire-extra", Arity::One),
        ("--sim-kv-lease-ms", Arity::One),
        ("--sim-kv-failure-ms", Arity::One),
        ("--sim-fail-to-load", Arity::Flag),
        ("--sim-die-after-steps", Arity::One),
        ("--sim-vanish-after-steps", Arity::One),
        ("--sim-hang-after-steps", Arity::One),
        ("--sim-deaf-after-adds", Arity::One),
    ]
    .into_iter()
    .map(|(name, arity)| EngineFlag {
        names: vec![name.to_owned()],
        arity,
    })
}

pub(crate) fn from_environment(
    flag: &str,
    environment: &impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let (_, names) = ENVIRONMENT.iter().find(|(name, _)| *name == flag)?;
    names.iter().find_map(|name| environment(name))
}

/// Returns the command, with the names that the environment may use written into the help.
pub fn command() -> clap::Command {
    let mut command = Cli::command().after_help(
        "MODEL is a folder or a Hugging Face id.\n\
         All flags of `vllm serve` are taken as well and go to the engine as they are; what follows `--` \
         is not even looked at.\n\
         The engine's own options: PYTHON -m vllm.entrypoints.cli.main serve --help=all",
    );
    for (flag, names) in ENVIRONMENT {
        command = command.mut_arg(flag.replace('-', "_"), |arg| {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg.help(format!("{help} [env: {}]", names.join(", ")))
        });
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sim(line: &str) -> Result<Cli, CliError> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        parse(&argv, &|_| None)
    }

    #[test]
    fn flags_of_the_engine_pass_verbatim_and_ours_do_not() {
        let cli = sim(
            "stator-agg /m --engine sim --max-model-len 64 --port 7 -O3 --sim-speedup 0 --served-model-name a b",
        )
        .unwrap();
        assert_eq!(cli.settings.model.as_deref(), Some("/m"));
        assert_eq!(cli.settings.port, Some(7));
        assert_eq!(
            cli.settings.engine_args.unwrap(),
            ["--max-model-len", "64", "-O3", "--sim-speedup", "0"]
        );
        assert_eq!(cli.settings.served_model_name.unwrap(), ["a", "b"]);
    }

    #[test]
    fn an_unknown_flag_is_refused_by_name() {
        let error = sim("stator-agg /m --engine sim --max-modle-len 64").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("--max-modle-len") && text.contains("--max-model-len"),
            "{text}"
        );
    }

    #[test]
    fn help_needs_no_vllm() {
        for flag in ["--help", "-h", "--version", "-V"] {
            let error = sim(&format!("stator-agg /m --nonsense {flag}")).unwrap_err();
            assert!(matches!(error, CliError::Own(_)), "{flag}: {error}");
        }
    }

    #[test]
    fn a_bare_number_is_seconds() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("-1").is_err());
    }

    #[test]
    fn the_command_is_well_formed() {
        command().debug_assert();
    }
}
