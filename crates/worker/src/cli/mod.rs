//! The command line of a worker: our own flags in groups, a model, and any flag of vLLM.

mod settings;

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use clap::{CommandFactory, FromArgMatches, Parser};
pub use stator_common::settings::{DiscoveryBackend, EventPlane};
use stator_common::{
    card::Role,
    settings::{DISAGGREGATION_MODE, IS_DECODE_WORKER, IS_PREFILL_WORKER, Variables},
};
use stator_engine::{
    flags::{self, Arity, EngineFlag, FlagError},
    introspect::{self, Installed, IntrospectError},
};

pub use settings::{EngineKind, KvRelay, Mode, RequestPlane, Settings};
pub use stator_common::settings::deprecated::Renamed;

use crate::python::{self, PythonError};

/// Flags of workers alone that the environment may give. The `DYN_*` names are Dynamo's (`dynamo.vllm`, 1.6).
pub(crate) const ENVIRONMENT: Variables = Variables(&[
    ("endpoint", &["STATOR_ENDPOINT", "DYN_ENDPOINT"]),
    (
        "component-name",
        &["STATOR_COMPONENT_NAME", "DYN_COMPONENT_NAME"],
    ),
    (
        "endpoint-name",
        &["STATOR_ENDPOINT_NAME", "DYN_ENDPOINT_NAME"],
    ),
    (
        "served-model-name",
        &["STATOR_SERVED_MODEL_NAME", "DYN_SERVED_MODEL_NAME"],
    ),
    ("disaggregation-mode", DISAGGREGATION_MODE),
    ("is-prefill-worker", IS_PREFILL_WORKER),
    ("is-decode-worker", IS_DECODE_WORKER),
    ("headless", &["STATOR_HEADLESS", "DYN_VLLM_HEADLESS"]),
    ("event-plane", &["STATOR_EVENT_PLANE", "DYN_EVENT_PLANE"]),
    ("kv-relay", &["STATOR_KV_RELAY"]),
    ("kv-relay-address", &["STATOR_KV_RELAY_ADDRESS"]),
    ("kv-relay-port", &["STATOR_KV_RELAY_PORT"]),
    (
        "kv-event-port",
        &["STATOR_KV_EVENT_PORT", "DYN_VLLM_KV_EVENT_PORT"],
    ),
    (
        "dump-config-to",
        &["STATOR_DUMP_CONFIG_TO", "DYN_DUMP_CONFIG_TO"],
    ),
    (
        "request-plane",
        &["STATOR_REQUEST_PLANE", "DYN_REQUEST_PLANE"],
    ),
    ("host", &["STATOR_HOST", "DYN_TCP_RPC_HOST"]),
    ("port", &["STATOR_PORT", "DYN_TCP_RPC_PORT"]),
    ("advertise-host", &["STATOR_ADVERTISE_HOST"]),
    ("engine", &["STATOR_ENGINE"]),
    ("engine-command", &["STATOR_ENGINE_COMMAND"]),
    ("connector", &["STATOR_CONNECTOR", "DYN_CONNECTOR"]),
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
]);

/// A worker's command line, without the flags of vLLM.
#[derive(Debug, Parser)]
#[command(
    version,
    about = "A worker of Stator: drives a vLLM engine and takes requests from processors",
    max_term_width = 100,
    disable_version_flag = true
)]
pub struct Cli {
    /// Reads settings from this TOML file; its keys are the names below with underscores, and
    /// `engine_args`, a list.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Prints the configuration that results from file, environment and flags, without secrets, and ends.
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,

    /// Writes configuration, versions and environment to this file, as JSON and without secrets, and goes on.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub dump_config_to: Option<PathBuf>,

    /// Looks whether this worker could serve: packages, ports, memory, and the workers that it would hand
    /// prompts to or take them from. Prints what it found, and ends with status 1 if it could not.
    #[arg(long, help_heading = "Configuration")]
    pub preflight: bool,

    /// Prints the version, and ends.
    #[arg(long, short = 'V', action = clap::ArgAction::Version, help_heading = "Configuration")]
    version: Option<bool>,

    /// The vLLM that will run, where it is installed here.
    #[arg(skip)]
    pub vllm: Option<Arc<Installed>>,

    /// Spellings of before that were used.
    #[arg(skip)]
    pub deprecated: Vec<Renamed>,

    /// What flags, environment and file have in common.
    #[command(flatten)]
    pub settings: Settings,
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
    role: Role,
    argv: &[OsString],
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<Cli, CliError> {
    let own = command(role);
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
    let own = command(role);
    // A file that cannot be read is complained about when it is loaded.
    let file: toml::Table = flags::own_value(argv, "config")
        .and_then(|path| std::fs::read_to_string(path).ok()?.parse().ok())
        .unwrap_or_default();
    let value = |long: &str| {
        flags::own_value(argv, long)
            .map(|value| value.to_string_lossy().into_owned())
            .or_else(|| ENVIRONMENT.value(long, environment))
            .or_else(|| Some(file.get(&long.replace('-', "_"))?.as_str()?.to_owned()))
    };
    let kind = value("engine");
    let attached = kind.as_deref() == Some("attach") || value("engine-attach").is_some();
    let mut vllm = None;
    let (known, hint) = if kind.as_deref() == Some("sim") {
        let mut known = EngineFlag::built_in();
        known.extend(simulator_flags());
        (known, "stator-sim --help".to_owned())
    } else if attached {
        (EngineFlag::built_in(), "vllm serve --help=all".to_owned())
    } else {
        let python = python::find(value("python").map(PathBuf::from), environment)?;
        let hint = flags::help_command(&python);
        let installed = vllm.insert(Arc::new(introspect::introspect(&python)?));
        (installed.flags.clone(), hint)
    };
    let split = flags::split(argv.iter().cloned(), &own, &known)
        .map_err(|error| CliError::Engine(error, hint))?;
    let deprecated = stator_common::settings::deprecated::used(&split.own, environment);
    let mut cli = Cli::from_arg_matches(&own.try_get_matches_from(split.own)?)?;
    cli.vllm = vllm;
    cli.deprecated = deprecated;
    cli.settings.model = split.model;
    if cli.dump_config_to.is_none() {
        cli.dump_config_to = ENVIRONMENT
            .value("dump-config-to", environment)
            .map(PathBuf::from);
    }
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

/// Returns the command, with the names that the environment may use written into the help.
pub fn command(role: Role) -> clap::Command {
    let command = Cli::command()
        .name(format!("stator-{role}"))
        .override_usage(format!("stator-{role} MODEL [OPTIONS] [VLLM FLAGS]"));
    ENVIRONMENT.told_by(command.after_help(
        "MODEL is a folder or a Hugging Face id.\n\
         All flags of `vllm serve` are taken as well and go to the engine as they are; what follows `--` \
         is not even looked at.\n\
         The engine's own options: PYTHON -m vllm.entrypoints.cli.main serve --help=all",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sim(line: &str) -> Result<Cli, CliError> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        parse(Role::Agg, &argv, &|_| None)
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
    fn the_command_is_well_formed() {
        command(Role::Agg).debug_assert();
    }
}
