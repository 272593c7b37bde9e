//! The models that are served here: found by discovery, built from the workers' files.
//!
//! [`Models`] is what a request looks a model up in: a snapshot behind one atomic pointer. The registry
//! (`registry`) is one task that follows discovery and replaces the snapshot; `load` fetches and
//! builds what a model needs, away from the async threads.

mod agreement;
mod generation;
mod load;
mod registry;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use stator_common::card;
use stator_common::{Code, WorkerId};
use tokio::time::Instant;

pub use generation::GenerationConfig;
pub use load::{Assets, LoadError};
pub use registry::Registry;

use crate::fleet::Fleet;
use crate::metrics::ModelMetrics;

/// How long a model whose last worker left is one that may come back. An engine that was lost takes a minute to start
/// again, and a large model several.
const REMEMBERED: Duration = Duration::from_secs(600);

/// One model, with everything needed to turn a request into tokens and tokens into an answer.
pub struct Model {
    /// The name that answers carry: the first of `card.names`.
    pub id: String,
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

#[derive(Default)]
struct Snapshot {
    /// Each model under each of its names.
    by_name: HashMap<String, Arc<Model>>,
    /// Each model once, by id.
    models: Vec<Arc<Model>>,
    /// Names of models that are still being loaded.
    loading: HashSet<String>,
    /// Names of models that cannot be loaded, and why.
    failed: HashMap<String, String>,
    unused: Vec<Unused>,
    /// Names of models whose last worker left, and when.
    left: HashMap<String, Instant>,
}

impl Snapshot {
    fn knows(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
            || self.loading.contains(name)
            || self.failed.contains_key(name)
    }

    fn is_empty(&self) -> bool {
        self.by_name.is_empty() && self.loading.is_empty() && self.failed.is_empty()
    }
}

impl Models {
    /// Replaces what is known, and remembers what is no longer there.
    fn replace(&self, mut snapshot: Snapshot) {
        let before = self.snapshot.load();
        let now = Instant::now();
        let left = before.left.iter().map(|(name, at)| (name, *at));
        let leaves = before.by_name.keys().map(|name| (name, now));
        snapshot.left = left
            .chain(leaves)
            .filter(|(name, at)| !snapshot.knows(name) && now - *at < REMEMBERED)
            .map(|(name, at)| (name.clone(), at))
            .collect();
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
                None => match snapshot.left.get(name) {
                    Some(at) if at.elapsed() < REMEMBERED => NoModel::Left(name.to_owned()),
                    _ => NoModel::Unknown(name.to_owned()),
                },
            }),
        }
    }

    /// Returns each model once, ordered by id.
    pub fn list(&self) -> Vec<Arc<Model>> {
        self.snapshot.load().models.clone()
    }

    /// Returns the workers that are known and not used.
    pub fn unused(&self) -> Vec<Unused> {
        self.snapshot.load().unused.clone()
    }
}
