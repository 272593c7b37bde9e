//! `--kv-transfer-config`: which connectors an engine has.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{Connector, HandOff};
use crate::flags::Given;

/// vLLM's flag, without its dashes.
const FLAG: &str = "kv-transfer-config";

/// The connector that is a list of others.
const MULTI: &str = "MultiConnector";

/// NIXL's own default of `kv_lease_duration` (nixl/base_scheduler.py).
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

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
    /// Takes a JSON object as it is.
    pub fn new(config: Map<String, Value>) -> Self {
        Self(config)
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
