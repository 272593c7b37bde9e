//! Where each setting comes from: the command line, else the environment, else the file, else the default.

use std::{fs, path::Path};

use clap::FromArgMatches;
use stator_common::{card::Role, settings};

use super::{Config, ConfigError, check};
use crate::{
    cli::{self, Cli, ENVIRONMENT, EngineKind, Settings},
    python,
};

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
    settings::overlay(
        &mut merged,
        layer(&environment_settings(role, environment)?)?,
    );
    settings::overlay(&mut merged, layer(&cli.settings)?);
    let mut config: Config = merged
        .try_into()
        .map_err(|error| ConfigError::Value(Box::new(error)))?;
    config.vllm = cli.vllm.clone();
    config.plane_token = settings::plane_token(config.plane_token_file.as_deref(), environment)?;
    config.etcd.read_password(environment)?;
    if config.engine_kind() == EngineKind::Vllm {
        config.python = Some(python::find(config.python.take(), environment)?);
    }
    check::check(&config, role)?;
    Ok(config)
}

/// Writes the configuration as TOML that [`load`] reads.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
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
pub(super) mod tests {
    use std::ffi::OsString;

    use stator_common::settings::Secret;

    use super::*;

    pub(crate) fn loaded(line: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
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
}
