//! Where each setting comes from: the command line, else the environment, else the file, else the default.

use clap::FromArgMatches;
use stator_common::{
    card::{Endpoint, Role},
    settings,
};
use stator_engine::{flags::Given, introspect::fetched_experts, model};

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
    let mut merged = spelled_out(settings::read_file(cli.config.as_deref())?)?;
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
    // What others left in the environment counts only where it is used.
    if config.uses_nats() {
        config.nats.complete(environment)?;
    }
    if config.engine_kind() == EngineKind::Vllm {
        config.python = Some(python::find(config.python.take(), environment)?);
    }
    config.experts = experts(&config)?;
    check::check(&config, role)?;
    Ok(config)
}

/// Asks the hub for what the model's files do not tell yet, so that ranks run together the first time as they will the
/// next.
fn experts(config: &Config) -> Result<Option<u32>, ConfigError> {
    let several = config.data_parallel_size > 1 && config.engine_kind() == EngineKind::Vllm;
    let (true, Some(python)) = (several, &config.python) else {
        return Ok(None);
    };
    if config.model.is_empty() || model::folder(&config.model).is_some() {
        return Ok(None);
    }
    let given = Given::read(&config.engine_args);
    let (revision, token) = (given.value("revision"), given.value("hf-token"));
    fetched_experts(python, &config.model, revision, token)
        .map(Some)
        .map_err(|source| ConfigError::Experts {
            model: config.model.clone(),
            source,
        })
}

/// Writes the configuration as TOML that [`load`] reads.
///
/// # Errors
/// When a path is not UTF-8.
pub fn to_toml(config: &Config) -> Result<String, toml::ser::Error> {
    toml::to_string_pretty(config)
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
    let layer = toml::Table::try_from(settings);
    spelled_out(layer.map_err(|error| ConfigError::Merge(Box::new(error)))?)
}

/// Takes `endpoint` apart, so that the layers above overrule each of its parts like any other setting. In its own
/// layer it wins over them.
fn spelled_out(mut layer: toml::Table) -> Result<toml::Table, ConfigError> {
    let Some(endpoint) = layer.remove("endpoint") else {
        return Ok(layer);
    };
    let text = endpoint.as_str().map(str::to_owned);
    let endpoint: Endpoint = text.unwrap_or_else(|| endpoint.to_string()).parse()?;
    for (part, name) in [
        ("namespace", endpoint.namespace),
        ("component_name", endpoint.component),
        ("endpoint_name", endpoint.endpoint),
    ] {
        layer.insert(part.to_owned(), name.into());
    }
    Ok(layer)
}

#[cfg(test)]
pub(super) mod tests {
    use std::{ffi::OsString, fs};

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
    fn an_endpoint_is_overruled_part_by_part_from_above() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("worker.toml");
        fs::write(&file, "endpoint = 'dyn://f.g.h'\n").unwrap();
        let place = |line: &str, variables: &[(&str, &str)]| {
            let line = format!("stator-agg /m --engine sim{line}");
            loaded(&line, variables).map(|config| config.place(Role::Agg).to_string())
        };
        let set = [("DYN_ENDPOINT", "dyn://a.b.c")];
        assert_eq!(place(" --namespace x", &set).unwrap(), "dyn://x.b.c");
        let all = " --endpoint dyn://d.e.f --namespace x";
        assert_eq!(place(all, &set).unwrap(), "dyn://d.e.f");
        let file = format!(" --config {}", file.display());
        let named = [("DYN_COMPONENT_NAME", "b")];
        assert_eq!(place(&file, &named).unwrap(), "dyn://f.b.h");
        fs::write(folder.path().join("worker.toml"), "endpoint = 'f.g'\n").unwrap();
        assert!(place(&file, &[]).is_err());
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
