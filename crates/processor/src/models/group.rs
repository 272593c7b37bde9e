//! The workers of one model, as the registry has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use stator_common::BlobHash;
use stator_common::card::{self, Adapter, Card};
use tokio::task::AbortHandle;

use super::Model;
use crate::fleet::Fleet;
use crate::metrics::ModelMetrics;
use crate::pool::Worker;

/// The workers of one model.
pub(super) struct Group {
    pub(super) fingerprint: BlobHash,
    pub(super) model: card::Model,
    pub(super) workers: Vec<Arc<Worker>>,
    pub(super) fleet: Arc<Fleet>,
    pub(super) metrics: ModelMetrics,
    pub(super) state: GroupState,
}

/// How far a model is.
pub(super) enum GroupState {
    Loading(AbortHandle),
    Ready(Arc<Model>),
    Failed(String),
}

/// A worker that is not used.
pub(super) struct Refused {
    pub(super) card: Arc<Card>,
    pub(super) reason: String,
}

impl Group {
    /// Returns the adapters that one of its workers or several serve, by name.
    pub(super) fn adapters(&self) -> BTreeMap<&str, &Adapter> {
        let cards = self.workers.iter().map(|worker| worker.card());
        let adapters = cards.flat_map(|card| &card.adapters);
        adapters
            .map(|adapter| (&adapter.name[..], adapter))
            .collect()
    }

    /// Returns every name under which clients ask for it: those of the model, and the adapters'.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let own = self.model.names.iter().map(String::as_str);
        own.chain(self.adapters().into_keys())
    }
}
