//! Follows discovery: which workers serve which model, from their arrival to their departure.
//!
//! One task owns this state. Workers that serve the same model are a group; the group's first worker
//! decides what the model is, and a later one that disagrees (another tokenizer, other limits) is refused
//! until the others have gone: mixed silently, it would answer some requests wrongly.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use metrics::Counter;
use stator_common::card::{Card, Role};
use stator_common::discovery::{Event, Watch};
use stator_common::nats::Nats;
use stator_common::plane::{Client, ClientConfig};
use stator_common::tickets::LineName;
use stator_common::{BlobHash, WorkerId, tls};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::agreement;
use super::group::{Group, GroupState, Refused};
use super::load::{self, Assets, LoadError};
use super::snapshot::Snapshot;
use super::{Model, Models};
use crate::config::Config;
use crate::fleet::{Fleet, LOOK_AGAIN};
use crate::knowledge::Following;
use crate::metrics::Metrics;
use crate::pool::Worker;

/// Pause before a model's files are asked for again, when no worker could deliver them.
const RELOAD_PAUSE: Duration = Duration::from_millis(500);

/// How often what was sent to workers too long ago is forgotten.
const EXPIRY: Duration = Duration::from_secs(1);

/// The task's state.
pub struct Registry {
    models: Arc<Models>,
    metrics: Arc<Metrics>,
    refusals: Counter,
    config: Arc<Config>,
    /// How workers are known that speak TLS.
    tls: Option<Arc<tls::Client>>,
    /// By model id.
    groups: HashMap<String, Group>,
    refused: HashMap<WorkerId, Refused>,
    loads: JoinSet<Loaded>,
    following: Following,
    nats: Nats,
}

/// The end of a load.
struct Loaded {
    id: String,
    fingerprint: BlobHash,
    result: Result<Assets, LoadError>,
}

impl Registry {
    /// Returns a registry that publishes into `models`.
    ///
    /// - `tls`: how workers are known that speak TLS.
    /// - `nats`: the link to workers and relays that are reached by it.
    pub fn new(
        models: Arc<Models>,
        metrics: Arc<Metrics>,
        config: Arc<Config>,
        tls: Option<Arc<tls::Client>>,
        nats: Nats,
    ) -> Self {
        let following = Following::new(config.router_mode, nats.clone());
        Self {
            refusals: metrics.workers_refused(),
            models,
            metrics,
            config,
            tls,
            groups: HashMap::new(),
            refused: HashMap::new(),
            loads: JoinSet::new(),
            following,
            nats,
        }
    }

    /// Follows `events`, for ever: if discovery ends, the workers of then stay.
    pub async fn run(mut self, mut events: Watch) {
        let mut followed = true;
        let mut expiry = tokio::time::interval(EXPIRY);
        let mut look = tokio::time::interval(LOOK_AGAIN);
        loop {
            tokio::select! {
                _ = expiry.tick() => {
                    self.groups.values().for_each(|group| group.fleet.expire());
                    continue;
                }
                _ = look.tick() => {
                    self.groups.values().for_each(|group| group.fleet.look());
                    continue;
                }
                event = events.next(), if followed => match event {
                    Some(Event::Put(card)) => self.put(Arc::from(card)),
                    Some(Event::Gone(worker)) => self.gone(&worker),
                    None => {
                        error!("discovery ended: workers that come or go are no longer noticed");
                        followed = false;
                    }
                },
                Some(loaded) = self.loads.join_next() => match loaded {
                    Ok(loaded) => self.loaded(loaded),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => error!(%error, "loading a model panicked"),
                },
                else => std::future::pending().await,
            }
            self.groups.values().for_each(|group| group.fleet.look());
            self.publish();
        }
    }

    fn put(&mut self, card: Arc<Card>) {
        if self
            .config
            .namespace
            .as_ref()
            .is_some_and(|own| *own != card.endpoint.namespace)
        {
            return;
        }
        match card.role {
            Role::Agg | Role::Prefill | Role::Decode => {}
            // Its leg of a hand-off is not run by this processor.
            Role::Encode => return,
        }
        if let Some(known) = self.known(&card.worker) {
            if **known == *card {
                return;
            }
            self.gone(&card.worker);
        }
        self.admit(card, None);
    }

    fn known(&self, worker: &WorkerId) -> Option<&Arc<Card>> {
        let mut workers = self.groups.values().flat_map(|group| &group.workers);
        workers
            .find(|known| known.id() == worker)
            .map(|known| known.card())
            .or_else(|| self.refused.get(worker).map(|refused| &refused.card))
    }

    /// Uses a worker, if it fits the others.
    ///
    /// - `before`: why it was refused, if it was; that again is no news.
    fn admit(&mut self, card: Arc<Card>, before: Option<&str>) {
        if let Err(reason) = agreement::check(&card, &self.groups) {
            if before != Some(&reason[..]) {
                error!(worker = %card.worker, address = card.address, reason, "worker refused");
                self.refusals.increment(1);
            }
            self.refused
                .insert(card.worker.clone(), Refused { card, reason });
            return;
        }
        let id = card.model.names[0].clone();
        info!(worker = %card.worker, role = %card.role, address = card.address, model = id, "worker joined");
        match self.groups.entry(id) {
            Entry::Occupied(mut group) => {
                let group = group.get_mut();
                let worker = join(
                    &group.fleet,
                    card,
                    &self.config,
                    self.tls.as_ref(),
                    &self.following,
                    &self.nats,
                );
                group.workers.push(worker);
            }
            Entry::Vacant(entry) => {
                let metrics = self.metrics.model(entry.key());
                let knowledge = self.following.knowledge(&card, &metrics);
                let mut fleet = Fleet::new(
                    self.config.routing(),
                    self.config.rules(),
                    knowledge,
                    rand::random(),
                    metrics.clone(),
                );
                let line = LineName::new(&card.endpoint.namespace, entry.key());
                fleet.share(&self.nats, line);
                let fleet = Arc::new(fleet);
                let worker = join(
                    &fleet,
                    Arc::clone(&card),
                    &self.config,
                    self.tls.as_ref(),
                    &self.following,
                    &self.nats,
                );
                let fingerprint = card.model.fingerprint();
                let load = load(
                    entry.key(),
                    &fingerprint,
                    vec![Arc::clone(&worker)],
                    Duration::ZERO,
                );
                entry.insert(Group {
                    fingerprint,
                    model: card.model.clone(),
                    workers: vec![worker],
                    fleet,
                    metrics,
                    state: GroupState::Loading(self.loads.spawn(load)),
                });
            }
        }
    }

    fn gone(&mut self, worker: &WorkerId) {
        if self.refused.remove(worker).is_some() {
            return;
        }
        let found = self.groups.iter_mut().find_map(|(id, group)| {
            let index = group
                .workers
                .iter()
                .position(|known| known.id() == worker)?;
            Some((id, group, index))
        });
        let Some((id, group, index)) = found else {
            return;
        };
        info!(%worker, model = id, "worker left");
        let left = group.workers.remove(index);
        group.fleet.remove(worker);
        // Who waits there is told, also if it was the last worker of the model.
        group.fleet.look();
        self.following.remove(worker);
        if !group.workers.is_empty() && left.card().adapters.is_empty() {
            return;
        }
        if group.workers.is_empty() {
            let id = id.clone();
            if let Some(group) = self.groups.remove(&id)
                && let GroupState::Loading(load) = group.state
            {
                load.abort();
            }
            info!(model = id, "model no longer served");
        }
        // Whoever was refused because of this model, or of an adapter, may fit now.
        for refused in std::mem::take(&mut self.refused).into_values() {
            self.admit(refused.card, Some(&refused.reason));
        }
    }

    fn loaded(&mut self, loaded: Loaded) {
        let Loaded {
            id,
            fingerprint,
            result,
        } = loaded;
        let Some(group) = self
            .groups
            .get_mut(&id)
            .filter(|group| group.fingerprint == fingerprint)
        else {
            return;
        };
        group.state = match result {
            Ok(assets) => {
                info!(model = id, workers = group.workers.len(), "model ready");
                let model = Model {
                    id,
                    adapter: None,
                    created: now(),
                    card: group.model.clone(),
                    assets,
                    metrics: group.metrics.clone(),
                    fleet: Arc::clone(&group.fleet),
                };
                GroupState::Ready(Arc::new(model))
            }
            Err(error) if error.may_pass() => {
                warn!(model = id, %error, "model files could not be fetched, trying again");
                let load = load(&id, &fingerprint, group.workers.clone(), RELOAD_PAUSE);
                GroupState::Loading(self.loads.spawn(load))
            }
            Err(error) => {
                error!(model = id, %error, "model cannot be served");
                GroupState::Failed(error.to_string())
            }
        };
    }

    fn publish(&self) {
        let snapshot = Snapshot::of(self.groups.values(), self.refused.values());
        self.models.replace(snapshot);
    }
}

/// Connects to a worker and adds it to a fleet.
fn join(
    fleet: &Fleet,
    card: Arc<Card>,
    config: &Config,
    tls: Option<&Arc<tls::Client>>,
    following: &Following,
    nats: &Nats,
) -> Arc<Worker> {
    let token = config.plane_token.as_ref();
    let handoff = card.handoff.as_ref();
    let protocol = handoff.map(|handoff| handoff.protocol).unwrap_or_default();
    let client = ClientConfig {
        worker: Some(card.worker.clone()),
        token: token.map(|token| token.reveal().to_owned()),
        nats: nats.clone(),
        tls: tls.cloned(),
        unclaimed: fleet.unclaimed(protocol),
        ..ClientConfig::default()
    };
    let client = Client::connect(&card.address, client);
    let worker = Arc::new(Worker::new(card, client));
    following.add(&fleet.add(&worker), worker.card());
    worker
}

/// Loads a model from the first worker that can deliver it.
fn load(
    id: &str,
    fingerprint: &BlobHash,
    workers: Vec<Arc<Worker>>,
    pause: Duration,
) -> impl Future<Output = Loaded> + Send + 'static {
    let (id, fingerprint) = (id.to_owned(), fingerprint.clone());
    async move {
        tokio::time::sleep(pause).await;
        let result = load::any(&workers).await;
        Loaded {
            id,
            fingerprint,
            result,
        }
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
