//! Processors in front of the same workers tell each other what they have booked (`--router-replica-sync`).
//!
//! Each finds the others in discovery, listens to them, and says all that it has booked: at most fifty times a
//! second when that changed, and once a second in any case. What others say is added to the loads of targets when a
//! decision is made ([`Target::load`]). Best effort: whoever is not heard costs balance, never an answer. Alone, a
//! processor says nothing and only looks now and then whether it still is.

mod listen;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prost::Message;
use stator_common::WorkerId;
use stator_common::card::Relay;
use stator_common::discovery::{Discovery, Peer, Registration};
use stator_common::events::plane::{Outlet, PlaneError};
use stator_common::events::{nats, zmq};
use stator_common::nats::Nats;
use stator_common::process;
use stator_common::proto::router::{Booked, Bookings};
use stator_common::settings::EventPlane;
use stator_router::{Load, peers};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use crate::config::Config;
use crate::models::Models;
use crate::pool::Target;
use listen::{Heard, Listeners};

/// How often a processor says what it has booked, at most: several times while a prompt is computed. With 100 ms, others
/// find out too late who is idle, and all go there (docs/benchmarks/dispatch.md).
const TELL: Duration = Duration::from_millis(20);
/// How often it says that in any case: three times as often as it is forgotten.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often a processor looks for others.
const LOOK: Duration = Duration::from_secs(2);
/// The longest pause before it tries again to become known: a refusal is repeated until somebody allows it.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Messages of others that may wait; each replaces the one before of the same processor.
const WAITING: usize = 256;
/// What the topics of bookings begin with.
const TOPIC: &str = "bookings/";

/// Why processors cannot tell each other what they booked.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The name means no address.
    #[error("resolve router_sync_host = {host}: {source}")]
    Resolve {
        /// As configured.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody can be told to come to every address.
    #[error(
        "router_sync_host = {0} is no address that others can be told: name the one of this machine under which other \
         processors reach it"
    )]
    Wildcard(IpAddr),
    /// It cannot be listened on.
    #[error("listen for other processors (router_sync_host, router_sync_port): {0}")]
    Plane(#[from] PlaneError),
}

/// A processor that others can hear and that hears nobody yet.
pub(crate) struct Peers {
    /// Absent until the NATS server that it is of is there.
    outlet: Option<Box<dyn Outlet>>,
    peer: Peer,
    nats: Nats,
}

impl Peers {
    /// Takes its place on the event plane, if others are to be told.
    ///
    /// - `nats`: the link to those that are reached by it.
    ///
    /// # Errors
    /// [`SyncError`].
    pub(crate) async fn bind(config: &Config, nats: &Nats) -> Result<Option<Self>, SyncError> {
        if !config.router_replica_sync {
            return Ok(None);
        }
        let name = format!("{:016x}", rand::random::<u64>());
        let (outlet, events): (Option<Box<dyn Outlet>>, _) = match config.event_plane {
            EventPlane::Zmq => {
                let (outlet, events) = listen(config).await?;
                (Some(Box::new(outlet)), events)
            }
            EventPlane::Nats => (None, nats::advertised(&name)),
        };
        let peer = Peer {
            name,
            host: process::network(),
            events,
        };
        Ok(Some(Self {
            outlet,
            peer,
            nats: nats.clone(),
        }))
    }

    /// Tells and hears, for ever.
    ///
    /// - `heard`: is set to how many others are heard.
    pub(crate) async fn run(
        self,
        discovery: Arc<dyn Discovery>,
        models: Arc<Models>,
        heard: Arc<AtomicUsize>,
    ) {
        let outlet = match self.outlet {
            Some(outlet) => outlet,
            None => outlet_of(&self.nats, &self.peer.name).await,
        };
        let joining = join(discovery.clone(), self.peer.clone());
        let (found, mut there) = mpsc::channel(1);
        let (hears, mut news) = mpsc::channel(WAITING);
        let mut listeners = Listeners::new(self.peer.clone(), self.nats, hears);
        let mut table = Table {
            peers: peers::Peers::default(),
            models,
            heard,
            since: Instant::now(),
        };
        let mut voice = Voice::new(outlet, self.peer.name);
        let mut batch = Vec::new();
        let mut tell = interval(TELL);
        tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let finding = find(discovery, found);
        tokio::pin!(joining, finding);
        let mut registration = None;
        loop {
            tokio::select! {
                () = &mut finding => {}
                joined = &mut joining, if registration.is_none() => registration = Some(joined),
                Some(others) = there.recv() => {
                    let gone = listeners.set(others);
                    table.take(gone.into_iter().map(Heard::Lost));
                }
                // All that is there: what each said last is what counts, and targets are told of it once.
                _ = news.recv_many(&mut batch, WAITING) => {
                    // What one said that has left meanwhile counts no longer.
                    table.take(batch.drain(..).filter(|heard| listeners.has(heard.who())));
                }
                _ = tell.tick(), if !listeners.is_empty() || !table.peers.is_empty() => {
                    table.expire();
                    if !listeners.is_empty() {
                        voice.tell(&table.models).await;
                    }
                }
            }
        }
    }
}

/// Listens for other processors on ports of its own.
async fn listen(config: &Config) -> Result<(zmq::Outlet, Relay), SyncError> {
    let host = &config.router_sync_host;
    let resolved = tokio::net::lookup_host((host.as_str(), config.router_sync_port)).await;
    let first = resolved.and_then(|mut found| {
        let none = || std::io::Error::other("the name means no address");
        found.next().ok_or_else(none)
    });
    let addr = first.map_err(|source| SyncError::Resolve {
        host: host.clone(),
        source,
    })?;
    if addr.ip().is_unspecified() {
        return Err(SyncError::Wildcard(addr.ip()));
    }
    let outlet = zmq::Outlet::bind(addr.ip(), addr.port()).await?;
    let events = outlet.ports().advertised(host);
    Ok((outlet, events))
}

/// Finds a place at the NATS server, as soon as that is there; why it is not was said by the link.
async fn outlet_of(nats: &Nats, name: &str) -> Box<dyn Outlet> {
    loop {
        match nats::Outlet::bind(nats, name).await {
            Ok(outlet) => return Box::new(outlet),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Makes a processor known, however long that takes. One that may not be is heard by nobody, and hears the others.
async fn join(discovery: Arc<dyn Discovery>, peer: Peer) -> Registration {
    let mut told = false;
    let mut pause = LOOK;
    loop {
        match discovery.join(peer.clone()).await {
            Ok(registration) => return registration,
            Err(error) if !told => {
                warn!(%error, "other processors cannot find this one yet");
                told = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Looks for processors, for ever.
async fn find(discovery: Arc<dyn Discovery>, found: mpsc::Sender<Vec<Peer>>) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        // While the place is away, those that are known stay.
        if let Ok(peers) = discovery.peers().await
            && found.send(peers).await.is_err()
        {
            return std::future::pending().await;
        }
    }
}

/// What others have said.
struct Table {
    peers: peers::Peers,
    models: Arc<Models>,
    heard: Arc<AtomicUsize>,
    since: Instant,
}

impl Table {
    /// Takes in what came from others.
    fn take(&mut self, heard: impl IntoIterator<Item = Heard>) {
        let mut is_news = false;
        for heard in heard {
            is_news = true;
            match heard {
                Heard::Said(bookings) => self.said(bookings),
                Heard::Lost(name) => self.peers.gone(&name),
            }
        }
        if is_news {
            self.apply();
        }
    }

    fn said(&mut self, bookings: Bookings) {
        let loads = bookings.booked.into_iter().map(|booked| {
            let load = Load {
                requests: booked.requests,
                prefill_tokens: booked.prefill_tokens,
                decode_tokens: booked.decode_tokens,
                kv_tokens: booked.kv_tokens,
                generating: booked.generating,
                prompts: booked.prompts,
            };
            (WorkerId(booked.worker), booked.dp_rank, load)
        });
        let now = self.since.elapsed();
        self.peers
            .heard(&bookings.processor, bookings.seq, loads, now);
    }

    fn expire(&mut self) {
        let before = self.peers.len();
        self.peers.expire(self.since.elapsed());
        // Also for targets that came since somebody spoke.
        if before > 0 {
            self.apply();
        }
    }

    fn apply(&self) {
        self.heard.store(self.peers.len(), Ordering::Relaxed);
        for target in targets(&self.models) {
            let rank = target.dp_rank.unwrap_or(0);
            target
                .elsewhere
                .set(self.peers.load(target.worker.id(), rank));
        }
    }
}

fn targets(models: &Models) -> impl Iterator<Item = Arc<Target>> {
    let models = models.list();
    models.into_iter().flat_map(|model| model.fleet.targets())
}

/// What this processor says.
struct Voice {
    outlet: Box<dyn Outlet>,
    bookings: Bookings,
    topic: String,
    told: Option<Instant>,
}

impl Voice {
    fn new(outlet: Box<dyn Outlet>, name: String) -> Self {
        Self {
            outlet,
            topic: format!("{TOPIC}{name}"),
            bookings: Bookings {
                processor: name,
                ..Bookings::default()
            },
            told: None,
        }
    }

    /// Says what is booked, if that changed or it is time.
    async fn tell(&mut self, models: &Models) {
        let booked: Vec<Booked> = targets(models)
            .filter_map(|target| booked(&target))
            .collect();
        let due = self.told.is_none_or(|told| told.elapsed() >= HEARTBEAT);
        if !due && booked == self.bookings.booked {
            return;
        }
        self.bookings.booked = booked;
        self.bookings.seq += 1;
        let news = self.bookings.encode_to_vec();
        self.outlet.publish(&self.topic, news.into()).await;
        self.told = Some(Instant::now());
    }
}

/// Returns what this processor has booked on a target, if anything.
fn booked(target: &Target) -> Option<Booked> {
    let load = target.ledger.load();
    (load != Load::default()).then(|| Booked {
        worker: target.worker.id().0.clone(),
        dp_rank: target.dp_rank.unwrap_or(0),
        requests: load.requests,
        prefill_tokens: load.prefill_tokens,
        decode_tokens: load.decode_tokens,
        kv_tokens: load.kv_tokens,
        generating: load.generating,
        prompts: load.prompts,
    })
}
