//! Which workers there are, and how everybody learns when that changes.
//!
//! A worker registers its [`Card`] and keeps a lease alive as long as it holds the [`Registration`];
//! whoever watches hears of cards that come, change and go. A lost lease is renewed, never fatal.
//! Backends: [`mod@file`] for one machine, [`etcd`] and [`kubernetes`] for clusters, [`mem`] for one process.

mod again;
pub mod etcd;
pub mod file;
pub mod kubernetes;
pub mod mem;
mod owner;
mod peer;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
pub use peer::Peer;
use tokio::sync::mpsc;

use crate::{
    Card, Code,
    ids::WorkerId,
    settings::{DiscoveryBackend, EtcdSettings, KubernetesSettings},
};

/// Events that may wait for a watcher before its source pauses.
const WATCH_BUFFER: usize = 1024;

/// What happened to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker is there, or its card changed.
    Put(Box<Card>),
    /// A worker left, died, or stopped renewing its lease.
    Gone(WorkerId),
}

/// A place where workers make themselves known.
#[async_trait]
pub trait Discovery: Send + Sync + 'static {
    /// Makes a worker known until the registration is dropped.
    ///
    /// # Errors
    /// The place cannot be written to.
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError>;

    /// Says at the start of a worker, which can register only much later, what would be in its way then.
    ///
    /// # Errors
    /// What will not pass by itself, with what to do about it.
    async fn check_register(&self) -> Result<(), DiscoveryError> {
        Ok(())
    }

    /// Returns the workers that are there, then what changes.
    ///
    /// # Errors
    /// The place cannot be read.
    async fn watch(&self) -> Result<Watch, DiscoveryError>;

    /// Makes a processor known to the others until the registration is dropped.
    ///
    /// # Errors
    /// The place cannot be written to.
    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError>;

    /// Returns the processors that are there now. To be asked every few seconds: they come and go rarely.
    ///
    /// # Errors
    /// The place cannot be read.
    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError>;

    /// Returns what to call the place when telling people of it.
    fn name(&self) -> String;
}

/// Opens the place that the settings of a role name.
///
/// - `path`: folder of the file discovery; absent: the one that all roles use then.
///
/// # Errors
/// [`OpenError`].
pub async fn open(
    backend: DiscoveryBackend,
    path: Option<&Path>,
    etcd: &EtcdSettings,
    kubernetes: &KubernetesSettings,
) -> Result<Arc<dyn Discovery>, OpenError> {
    Ok(match backend {
        DiscoveryBackend::File => {
            let root = path.map_or_else(file::Files::default_root, Path::to_owned);
            Arc::new(file::Files::new(root))
        }
        DiscoveryBackend::Etcd => Arc::new(etcd::Etcd::new(etcd)?),
        DiscoveryBackend::Kubernetes => Arc::new(kubernetes::Kubernetes::new(kubernetes).await?),
        DiscoveryBackend::Mem => Arc::new(mem::Mem::default()),
    })
}

/// Why a place cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Etcd(#[from] etcd::EtcdConfigError),
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::KubernetesConfigError),
}

/// Keeps a worker known. Dropping it is leaving.
#[must_use = "dropping a registration is leaving"]
pub struct Registration {
    _leave: Box<dyn Send + Sync>,
}

impl Registration {
    pub(crate) fn new(leave: impl Send + Sync + 'static) -> Self {
        Self {
            _leave: Box::new(leave),
        }
    }
}

/// What happens to workers, as events.
pub struct Watch {
    events: mpsc::Receiver<Event>,
}

impl Watch {
    /// Returns the next event; absent when the backend has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// Why discovery did not work.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("{action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("a worker's card cannot be written as JSON: {0}")]
    Card(#[from] serde_json::Error),
    #[error("etcd at {endpoints}: {reason}")]
    Etcd { endpoints: String, reason: String },
    #[error("kubernetes, {place}: {reason}")]
    Kubernetes { place: String, reason: String },
    #[error("'{0}' cannot be part of a file name or a key")]
    Name(String),
}

impl DiscoveryError {
    /// Returns what this means for a request.
    pub fn code(&self) -> Code {
        match self {
            Self::Io { .. } | Self::Etcd { .. } | Self::Kubernetes { .. } => Code::Unavailable,
            Self::Card(_) | Self::Name(_) => Code::Internal,
        }
    }
}

/// Returns what happened between two states, departures first.
fn difference(before: &BTreeMap<WorkerId, Card>, now: &BTreeMap<WorkerId, Card>) -> Vec<Event> {
    let gone = before
        .keys()
        .filter(|worker| !now.contains_key(worker))
        .map(|worker| Event::Gone(worker.clone()));
    let put = now
        .iter()
        .filter(|(worker, card)| before.get(worker) != Some(card))
        .map(|(_, card)| Event::Put(Box::new(card.clone())));
    gone.chain(put).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::card::{Endpoint, Model, Role};

    pub(super) fn peer(name: &str) -> Peer {
        Peer {
            name: name.to_owned(),
            host: "here".to_owned(),
            events: crate::card::Relay {
                endpoint: "tcp://127.0.0.1:1".to_owned(),
                snapshot_endpoint: "tcp://127.0.0.1:2".to_owned(),
            },
        }
    }

    pub(super) fn card(worker: &str) -> Card {
        Card {
            worker: WorkerId(worker.to_owned()),
            role: Role::Agg,
            endpoint: Endpoint {
                namespace: "test".to_owned(),
                component: "backend".to_owned(),
                endpoint: "generate".to_owned(),
            },
            address: "127.0.0.1:1".to_owned(),
            model: Model {
                names: vec!["m".to_owned()],
                root: "/m".to_owned(),
                max_model_len: 2048,
                vocab_size: 100,
                block_size: 16,
                kv_blocks: 10,
                max_num_seqs: 8,
                max_num_batched_tokens: 2048,
                dp_size: 1,
                files: BTreeMap::new(),
                tool_call_parser: None,
                reasoning_parser: None,
                vllm_version: "0.32.0".to_owned(),
                max_logprobs: 20,
            },
            handoff: None,
            kv_events: None,
            adapters: Vec::new(),
        }
    }
}
