//! Which field of the engine's positional structs is where: the one thing that changes between
//! vLLM releases without notice.
//!
//! A [`Schema`] comes from the installed vLLM's sources ([`crate::introspect`]) or, for an engine that
//! was started elsewhere, from the table of the nearest release that is not newer
//! ([`Schema::built_in`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Releases whose wire is tested, oldest and newest. Both are `(major, minor)`.
///
/// 0.27 is where KV events became maps and `ec_transfer_params` moved the outputs' fields to
/// where they are today; 0.33 is the newest release with golden vectors.
pub const SUPPORTED: (Release, Release) = (Release(0, 27), Release(0, 33));

/// Tables of releases, oldest first.
const BUILT_IN: [(Release, &str); 4] = [
    (Release(0, 23), include_str!("schema/v0_23.json")),
    (Release(0, 27), include_str!("schema/v0_27.json")),
    (Release(0, 32), include_str!("schema/v0_32.json")),
    (Release(0, 33), include_str!("schema/v0_33.json")),
];

/// `major.minor` of a vLLM version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl Release {
    /// Reads `0.32.0+cpu`, `0.33.1.dev12+gabc` and the like.
    pub fn parse(version: &str) -> Option<Self> {
        let mut parts = version.split(|c: char| !c.is_ascii_digit());
        Some(Self(
            parts.next()?.parse().ok()?,
            parts.next()?.parse().ok()?,
        ))
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The positional structs of one vLLM version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schema {
    pub vllm_version: String,
    pub structs: BTreeMap<String, Table>,
}

/// The fields of one struct in the order of the wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub fields: Vec<Field>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Field {
    pub name: String,
    /// The value an encoder writes for a field that it does not know; absent: required.
    #[serde(
        default,
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    pub default: Option<serde_json::Value>,
}

/// Tells `"default": null` from no default.
fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<serde_json::Value>, D::Error> {
    serde_json::Value::deserialize(deserializer).map(Some)
}

/// Why an engine's version or schema cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    #[error(
        "vLLM {version} is outside the supported range {} to {}; \
         allow untested versions to try it all the same",
        SUPPORTED.0, SUPPORTED.1
    )]
    Unsupported { version: String },
    #[error("`{version}` does not start with a release number such as 0.32")]
    Version { version: String },
    #[error("vLLM {version} has no struct `{name}`")]
    NoStruct { version: String, name: &'static str },
    #[error("vLLM {version}: `{name}` has no field `{field}`")]
    NoField {
        version: String,
        name: &'static str,
        field: &'static str,
    },
    #[error("vLLM {version}: `{name}` requires the field `{field}`, which is not known here")]
    UnknownRequired {
        version: String,
        name: &'static str,
        field: String,
    },
}

/// Whether versions outside [`SUPPORTED`] are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Untested {
    #[default]
    Refuse,
    Allow,
}

impl Schema {
    /// Returns the table for a version that an engine reported.
    ///
    /// Between two known releases the older one's table is right: fields that requests write and
    /// outputs are read by have only ever been added behind them since 0.27.
    ///
    /// # Errors
    /// [`SchemaError::Version`] and [`SchemaError::Unsupported`].
    pub fn built_in(version: &str, untested: Untested) -> Result<Self, SchemaError> {
        let release = check_version(version, untested)?;
        let (_, text) = BUILT_IN
            .iter()
            .rev()
            .find(|(known, _)| *known <= release)
            .unwrap_or(&BUILT_IN[0]);
        let mut schema: Self =
            serde_json::from_str(text).expect("the built-in tables are checked by a test");
        schema.vllm_version = version.to_owned();
        Ok(schema)
    }

    pub(crate) fn table(&self, name: &'static str) -> Result<&Table, SchemaError> {
        self.structs.get(name).ok_or_else(|| SchemaError::NoStruct {
            version: self.vllm_version.clone(),
            name,
        })
    }
}

/// Refuses versions outside [`SUPPORTED`], unless untested ones are allowed.
///
/// # Errors
/// [`SchemaError::Version`] and [`SchemaError::Unsupported`].
pub fn check_version(version: &str, untested: Untested) -> Result<Release, SchemaError> {
    let release = Release::parse(version).ok_or_else(|| SchemaError::Version {
        version: version.to_owned(),
    })?;
    let supported = (SUPPORTED.0..=SUPPORTED.1).contains(&release);
    if !supported && untested == Untested::Refuse {
        return Err(SchemaError::Unsupported {
            version: version.to_owned(),
        });
    }
    Ok(release)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_tables_parse_and_bear_their_release() {
        for (release, text) in BUILT_IN {
            let schema: Schema = serde_json::from_str(text).expect("parses");
            assert_eq!(Release::parse(&schema.vllm_version), Some(release));
        }
    }

    #[test]
    fn versions_outside_the_range_are_refused_unless_allowed() {
        for version in ["0.26.4", "0.34.0", "1.0.0"] {
            let refused = Schema::built_in(version, Untested::Refuse);
            assert!(matches!(refused, Err(SchemaError::Unsupported { .. })));
            assert!(Schema::built_in(version, Untested::Allow).is_ok());
        }
        assert!(Schema::built_in("dev", Untested::Allow).is_err());
    }

    #[test]
    fn a_version_between_two_tables_takes_the_older_one() {
        let fields = |version| {
            let schema = Schema::built_in(version, Untested::Refuse).expect("supported");
            schema.structs["LoRARequest"].fields.clone()
        };
        assert_eq!(fields("0.30.2+cpu"), fields("0.27.0"));
        assert_ne!(fields("0.30.2+cpu"), fields("0.32.0"));
    }
}
