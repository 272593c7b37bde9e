//! What the connectors import.

use stator_common::card::Role;
use stator_engine::schema::{Untested, check_version};

use super::Finding;
use crate::config::Config;

/// A connector (by the beginning of vLLM's name), the module that it imports, and who brings that.
const NEEDS: [(&str, &str, &str); 4] = [
    ("Nixl", "nixl", "nixl"),
    ("LMCache", "lmcache", "lmcache"),
    ("Dynamo", "kvbm", "kvbm"),
    ("Mooncake", "mooncake", "mooncake-transfer-engine"),
];

/// Looks at an installed vLLM; at nothing where the engine is another or elsewhere.
pub(super) fn examine(config: &Config, role: Role) -> Vec<Finding> {
    let Some(vllm) = &config.vllm else {
        return Vec::new();
    };
    let version = &vllm.schema.vllm_version;
    let mut findings = Vec::new();
    let python = config.python.as_deref().map_or_else(
        || "its Python".to_owned(),
        |python| python.display().to_string(),
    );
    let untested = if config.any_vllm_version {
        Untested::Allow
    } else {
        Untested::Refuse
    };
    findings.push(match check_version(version, untested) {
        Ok(_) => Finding::fine("vllm", format!("{version} of {python}")),
        Err(error) => Finding::error(
            "vllm",
            error.to_string(),
            "install a tested version, or say --any-vllm-version",
        ),
    });
    let Ok(Some(transfer)) = config.transfer(role) else {
        return findings;
    };
    for connector in transfer.connectors() {
        let Some((_, module, package)) =
            NEEDS.iter().find(|(name, ..)| connector.starts_with(name))
        else {
            continue;
        };
        findings.push(if vllm.modules.iter().any(|found| found == module) {
            let version = vllm.packages.get(*package);
            let version = version.map_or("of an unknown version", String::as_str);
            Finding::fine("packages", format!("{module} {version}, for {connector}"))
        } else {
            Finding::error(
                "packages",
                format!("{connector} imports {module}, which {python} does not have"),
                format!("{python} -m pip install {package}"),
            )
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use stator_engine::{handoff::ShortName, introspect::Installed, schema::Schema};

    use super::*;
    use crate::preflight::Severity;

    fn severities(version: &str, modules: &[&str], connector: &[ShortName]) -> Vec<Severity> {
        let config = Config {
            connector: connector.to_vec(),
            vllm: Some(Arc::new(Installed {
                schema: Schema {
                    vllm_version: version.to_owned(),
                    structs: BTreeMap::new(),
                },
                flags: Vec::new(),
                packages: BTreeMap::new(),
                modules: modules.iter().map(ToString::to_string).collect(),
            })),
            ..Config::default()
        };
        let findings = examine(&config, Role::Decode);
        findings.iter().map(|finding| finding.severity).collect()
    }

    #[test]
    fn a_module_that_a_connector_imports_must_be_there() {
        use Severity::{Error, Fine};
        let nixl = &[ShortName::Nixl];
        assert_eq!(severities("0.32.0", &["nixl"], nixl), [Fine, Fine]);
        assert_eq!(severities("0.32.0", &[], nixl), [Fine, Error]);
        assert_eq!(severities("0.32.0", &[], &[]), [Fine]);
        assert_eq!(severities("0.20.0", &[], &[]), [Error]);
        let several = &[ShortName::Kvbm, ShortName::Nixl];
        assert_eq!(
            severities("0.32.0", &["nixl"], several),
            [Fine, Error, Fine]
        );
    }
}
