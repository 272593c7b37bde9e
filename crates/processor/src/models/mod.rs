//! The models that are served here: found by discovery, built from the workers' files.
//!
//! [`Models`] is what a request looks a model up in: a snapshot behind one atomic pointer. The registry
//! (`registry`) is one task that follows discovery and replaces the snapshot; `load` fetches and
//! builds what a model needs, away from the async threads. A LoRA adapter is a [`Model`], too, for those who ask for it
//! by name; it is there as long as one of the model's workers says that it serves it.

mod agreement;
mod generation;
mod group;
mod load;
mod registry;
mod snapshot;

use std::sync::Arc;

use arc_swap::ArcSwap;
use stator_common::card;
use stator_common::{Code, WorkerId};

pub use generation::GenerationConfig;
pub use load::{Assets, LoadError};
pub use registry::Registry;

use crate::fleet::Fleet;
use crate::metrics::ModelMetrics;
use snapshot::Snapshot;

/// One model, with everything needed to turn a request into tokens and tokens into an answer.
pub struct Model {
    /// The name that answers carry: the first of `card.names`, or the adapter's.
    pub id: String,
    /// The LoRA adapter that makes it another model than its workers' own; it shares the rest with that.
    pub adapter: Option<card::Adapter>,
    /// When this process learnt of it, in seconds since 1970.
    pub created: u64,
    /// What its workers publish about it.
    pub card: card::Model,
    /// What its files say.
    pub assets: Assets,
    /// What is measured about it.
    pub metrics: ModelMetrics,
    /// The workers that serve it.
    pub fleet: Arc<Fleet>,
}

impl Model {
    /// Returns the model that an adapter makes of this one.
    fn adapted(&self, adapter: &card::Adapter) -> Self {
        Self {
            id: adapter.name.clone(),
            adapter: Some(adapter.clone()),
            created: self.created,
            card: self.card.clone(),
            assets: self.assets.clone(),
            metrics: self.metrics.clone(),
            fleet: Arc::clone(&self.fleet),
        }
    }

    /// Returns the adapter's name, as workers are told it; empty: none.
    pub fn lora(&self) -> &str {
        self.adapter
            .as_ref()
            .map_or("", |adapter| &adapter.name[..])
    }
}

/// Why no model of a name can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoModel {
    /// No worker says that it serves it, and none did of late.
    #[error("the model `{0}` does not exist")]
    Unknown(String),
    /// No worker was found, whatever it serves.
    #[error("no worker was found that serves a model")]
    Nobody,
    /// All workers that served it have left.
    #[error("the model `{0}` has no worker at present")]
    Left(String),
    /// A worker serves it, but its tokenizer and template are still being fetched.
    #[error("the model `{0}` is still being loaded")]
    Loading(String),
    /// A worker serves it, but its files cannot be used: waiting does not help.
    #[error("the model `{name}` cannot be served: {reason}")]
    Failed {
        /// As asked for.
        name: String,
        /// Why.
        reason: String,
    },
}

impl NoModel {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        match self {
            Self::Unknown(_) => Code::NotFound,
            Self::Nobody | Self::Left(_) | Self::Loading(_) => Code::Unavailable,
            Self::Failed { .. } => Code::Internal,
        }
    }
}

/// A worker that discovery knows and that gets no requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    /// The worker.
    pub worker: WorkerId,
    /// The first name of its model.
    pub model: String,
    /// Why.
    pub reason: String,
    /// Whether that may pass by itself.
    pub passing: bool,
}

/// The models that are served here.
#[derive(Default)]
pub struct Models {
    snapshot: ArcSwap<Snapshot>,
}

impl Models {
    /// Replaces what is known; what is no longer there is remembered for a while.
    fn replace(&self, snapshot: Snapshot) {
        let snapshot = snapshot.after(&self.snapshot.load());
        self.snapshot.store(Arc::new(snapshot));
    }

    /// Returns the model of a name.
    pub fn get(&self, name: &str) -> Option<Arc<Model>> {
        self.snapshot.load().by_name.get(name).cloned()
    }

    /// Returns the model of a name, or why there is none.
    ///
    /// # Errors
    /// [`NoModel`].
    pub fn find(&self, name: &str) -> Result<Arc<Model>, NoModel> {
        let snapshot = self.snapshot.load();
        match snapshot.by_name.get(name) {
            Some(model) => Ok(Arc::clone(model)),
            None if snapshot.loading.contains(name) => Err(NoModel::Loading(name.to_owned())),
            None => Err(match snapshot.failed.get(name) {
                Some(reason) => NoModel::Failed {
                    name: name.to_owned(),
                    reason: reason.clone(),
                },
                None if snapshot.is_empty() => NoModel::Nobody,
                None if snapshot.left_lately(name) => NoModel::Left(name.to_owned()),
                None => NoModel::Unknown(name.to_owned()),
            }),
        }
    }

    /// Returns each model once, ordered by id; adapters are none.
    pub fn list(&self) -> Vec<Arc<Model>> {
        self.snapshot.load().models.clone()
    }

    /// Returns each adapter of a model once, ordered by name.
    pub fn adapters(&self) -> Vec<Arc<Model>> {
        self.snapshot.load().adapters.clone()
    }

    /// Returns the workers that are known and not used.
    pub fn unused(&self) -> Vec<Unused> {
        self.snapshot.load().unused.clone()
    }
}
