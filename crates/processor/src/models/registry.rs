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
use stator_common::card::{self, Card, Role};
use stator_common::discovery::{Event, Watch};
use stator_common::nats::Nats;
use stator_common::plane::{Client, ClientConfig};
use stator_common::tickets::LineName;
use stator_common::{BlobHash, WorkerId, tls};
use stator_text::{reasoning, tools};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{error, info, warn};

use super::agreement::disagreement;
use super::load::{self, Assets, LoadError};
use super::{Model, Models, Snapshot, Unused};
use crate::config::Config;
use crate::fleet::{Fleet, LOOK_AGAIN};
use crate::knowledge::Following;
use crate::metrics::{Metrics, ModelMetrics};
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

/// The workers of one model.
struct Group {
    fingerprint: BlobHash,
    model: card::Model,
    workers: Vec<Arc<Worker>>,
    fleet: Arc<Fleet>,
    metrics: ModelMetrics,
    state: GroupState,
}

enum GroupState {
    Loading(AbortHandle),
    Ready(Arc<Model>),
    Failed(String),
}

struct Refused {
    card: Arc<Card>,
    reason: String,
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
        self.admit(card);
    }

    fn known(&self, worker: &WorkerId) -> Option<&Arc<Card>> {
        let mut workers = self.groups.values().flat_map(|group| &group.workers);
        workers
            .find(|known| known.id() == worker)
            .map(|known| known.card())
            .or_else(|| self.refused.get(worker).map(|refused| &refused.card))
    }

    fn admit(&mut self, card: Arc<Card>) {
        if let Err(reason) = self.check(&card) {
            error!(worker = %card.worker, address = card.address, reason, "worker refused");
            self.refusals.increment(1);
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

    /// Says whether a worker fits those that are there, and if not, why.
    fn check(&self, card: &Card) -> Result<(), String> {
        let Some(id) = card.model.names.first() else {
            return Err("its model has no name".to_owned());
        };
        check_parsers(&card.model)?;
        if let Some(group) = self.groups.get(id) {
            if group.fingerprint == card.model.fingerprint() {
                return Ok(());
            }
            return Err(disagreement(&group.model, &card.model));
        }
        let taken = self.groups.iter().find_map(|(other, group)| {
            let shared = group
                .model
                .names
                .iter()
                .find(|name| card.model.names.contains(name))?;
            Some(format!("the name {shared} belongs to the model {other}"))
        });
        taken.map_or(Ok(()), Err)
    }

    fn gone(&mut self, worker: &WorkerId) {
        if self.refused.remove(worker).is_some() {
            return;
        }
        let mut groups = self.groups.iter_mut();
        let Some((id, group)) =
            groups.find(|(_, group)| group.workers.iter().any(|known| known.id() == worker))
        else {
            return;
        };
        info!(%worker, model = id, "worker left");
        group.workers.retain(|known| known.id() != worker);
        group.fleet.remove(worker);
        // Who waits there is told, also if it was the last worker of the model.
        group.fleet.look();
        self.following.remove(worker);
        if !group.workers.is_empty() {
            return;
        }
        let id = id.clone();
        if let Some(group) = self.groups.remove(&id)
            && let GroupState::Loading(load) = group.state
        {
            load.abort();
        }
        info!(model = id, "model no longer served");
        // Whoever was refused because of this model may fit now.
        for refused in std::mem::take(&mut self.refused).into_values() {
            self.admit(refused.card);
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
        let mut snapshot = Snapshot::default();
        for group in self.groups.values() {
            match &group.state {
                GroupState::Ready(model) => {
                    snapshot.models.push(Arc::clone(model));
                    let names = model.card.names.iter();
                    snapshot
                        .by_name
                        .extend(names.map(|name| (name.clone(), Arc::clone(model))));
                }
                GroupState::Loading(_) => {
                    snapshot.loading.extend(group.model.names.iter().cloned());
                    snapshot
                        .unused
                        .extend(unused(group, "its model is still being loaded", true));
                }
                GroupState::Failed(reason) => {
                    let names = group.model.names.iter();
                    snapshot
                        .failed
                        .extend(names.map(|name| (name.clone(), reason.clone())));
                    snapshot.unused.extend(unused(group, reason, false));
                }
            }
        }
        snapshot.models.sort_by(|a, b| a.id.cmp(&b.id));
        snapshot.unused.extend(self.refused.values().map(|refused| {
            Unused {
                worker: refused.card.worker.clone(),
                model: refused
                    .card
                    .model
                    .names
                    .first()
                    .cloned()
                    .unwrap_or_default(),
                reason: refused.reason.clone(),
                passing: false,
            }
        }));
        snapshot.unused.sort_by(|a, b| a.worker.cmp(&b.worker));
        self.models.snapshot.store(Arc::new(snapshot));
    }
}

fn unused(group: &Group, reason: &str, passing: bool) -> impl Iterator<Item = Unused> {
    group.workers.iter().map(move |worker| Unused {
        worker: worker.id().clone(),
        model: group.model.names[0].clone(),
        reason: reason.to_owned(),
        passing,
    })
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

/// Says why answers of a model could not be read: vLLM's own server does not start with such a name, either.
fn check_parsers(model: &card::Model) -> Result<(), String> {
    if let Some(name) = &model.tool_call_parser {
        tools::check(name).map_err(|error| error.to_string())?;
    }
    if let Some(name) = &model.reasoning_parser {
        reasoning::check(name).map_err(|error| error.to_string())?;
    }
    Ok(())
}
