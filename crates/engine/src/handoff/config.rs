//! `--kv-transfer-config`: which connectors an engine has, as it was given or as it follows from short names.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use stator_common::card::Role;

use super::{Connector, HandOff};
use crate::flags::{self, Given};

/// vLLM's flag, without its dashes.
const FLAG: &str = "kv-transfer-config";

/// The connector that is a list of others.
const MULTI: &str = "MultiConnector";

/// NIXL's own default of `kv_lease_duration` (nixl/base_scheduler.py).
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// A connector by the short name that people say, as Dynamo's `--connector` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShortName {
    /// NIXL: KV goes from engine to engine.
    Nixl,
    /// LMCache: beside NIXL and on aggregated workers a cache below the engine's own; by itself, KV goes from
    /// engine to engine through its server.
    Lmcache,
    /// Dynamo's block manager: a cache below the engine's own.
    Kvbm,
    /// No connector.
    None,
}

impl ShortName {
    /// Returns the name as it is said.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nixl => "nixl",
            Self::Lmcache => "lmcache",
            Self::Kvbm => "kvbm",
            Self::None => "none",
        }
    }
}

/// vLLM's `--kv-transfer-config`, one JSON object.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferConfig(Map<String, Value>);

/// Why an engine's `--kv-transfer-config` cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("--kv-transfer-config is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    #[error("--kv-transfer-config names no `kv_connector`")]
    NoConnector,
}

impl TransferConfig {
    /// Returns what short names stand for; `None` where they name no connector.
    ///
    /// - `cpu`: the engine computes on the CPU, which NIXL's buffers have to know.
    pub fn of_names(names: &[ShortName], role: Role, cpu: bool) -> Option<Self> {
        let side = match role {
            Role::Prefill => "kv_producer",
            Role::Decode => "kv_consumer",
            Role::Agg | Role::Encode => "kv_both",
        };
        let nixl = names.contains(&ShortName::Nixl);
        let part = |name: &ShortName| match name {
            ShortName::Nixl if cpu => Some(json!({
                "kv_connector": "NixlConnector", "kv_role": side, "kv_buffer_device": "cpu",
            })),
            ShortName::Nixl => Some(json!({"kv_connector": "NixlConnector", "kv_role": side})),
            // A cache is written and read on both sides, whichever way the hand-off goes.
            ShortName::Lmcache if nixl || role == Role::Agg => Some(json!({
                "kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both",
            })),
            ShortName::Lmcache => Some(json!({
                "kv_connector": "LMCacheMPConnector", "kv_role": side,
            })),
            ShortName::Kvbm => Some(json!({
                "kv_connector": "DynamoConnector",
                "kv_connector_module_path": "kvbm.vllm_integration.connector",
                "kv_role": "kv_both",
            })),
            ShortName::None => None,
        };
        let mut parts: Vec<Value> = names.iter().filter_map(part).collect();
        let config = match parts.len() {
            0 => return None,
            1 => parts.remove(0),
            _ => json!({
                "kv_connector": MULTI, "kv_role": side,
                "kv_connector_extra_config": {"connectors": parts},
            }),
        };
        match config {
            Value::Object(config) => Some(Self(config)),
            _ => None,
        }
    }

    /// Reads it from vLLM's arguments; `None` where they do not have it.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn given(args: &[String]) -> Result<Option<Self>, TransferError> {
        let Some(config) = Given::read(args).object(FLAG)? else {
            return Ok(None);
        };
        let config = Self(config);
        if config.connectors().is_empty() {
            return Err(TransferError::NoConnector);
        }
        Ok(Some(config))
    }

    /// Returns vLLM's names of the connectors, those of a list one by one.
    pub fn connectors(&self) -> Vec<&str> {
        self.parts()
            .filter_map(|part| part.get("kv_connector")?.as_str())
            .collect()
    }

    /// Returns how the engine hands KV on; `None` where no connector does.
    ///
    /// Of several the first counts, from which vLLM loads (multi_connector.py).
    pub fn handoff(&self) -> Option<HandOff> {
        let named =
            |part: &Map<String, Value>| Connector::of_name(part.get("kv_connector")?.as_str()?);
        let (part, connector) = self.parts().find_map(|part| Some((part, named(part)?)))?;
        let lease = part
            .get("kv_connector_extra_config")
            .and_then(|extra| extra.get("kv_lease_duration")?.as_f64())
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Some(HandOff {
            connector,
            lease: lease.unwrap_or(DEFAULT_LEASE),
        })
    }

    /// Says whether the engine has a NIXL of whichever kind, and with it a side channel.
    pub fn has_nixl(&self) -> bool {
        let nixl = |name| {
            matches!(
                Connector::of_name(name),
                Some(Connector::Nixl | Connector::NixlPush)
            )
        };
        self.connectors().into_iter().any(nixl)
    }

    /// Returns the id by which other engines know this one, where it is given.
    pub fn engine_id(&self) -> Option<&str> {
        self.0.get("engine_id")?.as_str()
    }

    /// Gives the engine an id by which others know it.
    #[must_use]
    pub fn with_engine_id(mut self, id: &str) -> Self {
        self.0.insert("engine_id".to_owned(), id.into());
        self
    }

    /// Puts this into vLLM's arguments, in place of what is there.
    #[must_use]
    pub fn put_into(&self, args: &[String]) -> Vec<String> {
        let mut args = flags::without(args, FLAG);
        args.extend([format!("--{FLAG}"), self.to_json()]);
        args
    }

    /// Returns it as the flag's value.
    pub fn to_json(&self) -> String {
        serde_json::Value::Object(self.0.clone()).to_string()
    }

    /// The connectors' configurations.
    fn parts(&self) -> Box<dyn Iterator<Item = &Map<String, Value>> + '_> {
        if self.0.get("kv_connector").and_then(Value::as_str) != Some(MULTI) {
            return Box::new(std::iter::once(&self.0));
        }
        let list = self.0.get("kv_connector_extra_config");
        let list = list.and_then(|extra| extra.get("connectors")?.as_array());
        Box::new(list.into_iter().flatten().filter_map(Value::as_object))
    }
}
