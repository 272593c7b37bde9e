//! One worker as the processor knows it, and the targets that it offers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use stator_common::card::{Card, HandOffProtocol};
use stator_common::events::ViewId;
use stator_common::plane::{Client, State};
use stator_common::proto::worker::Load;
use stator_common::{Code, WorkerId};
use stator_router::{Ledger, Room};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::knowledge::{Entry, Knowledge};

/// How long a worker is avoided after its first failure; doubles with each further one.
const INHIBIT_FIRST: Duration = Duration::from_millis(500);
/// How long a worker is avoided at most. A worker that is really gone leaves discovery, in about this time.
const INHIBIT_MOST: Duration = Duration::from_secs(10);

/// Whether a worker may get a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Connected.
    Open,
    /// Connected, but it failed a moment ago.
    Inhibited,
    /// Not connected, or it takes nothing new.
    Absent,
}

/// One worker process.
pub struct Worker {
    card: Arc<Card>,
    client: Client,
    state: watch::Receiver<State>,
    inhibition: Mutex<Inhibition>,
    decisions: AtomicU64,
}

#[derive(Default)]
struct Inhibition {
    until: Option<Instant>,
    failures: u32,
}

impl Worker {
    pub(crate) fn new(card: Arc<Card>, client: Client) -> Self {
        let state = client.state();
        Self {
            card,
            client,
            state,
            inhibition: Mutex::default(),
            decisions: AtomicU64::new(0),
        }
    }

    /// Returns the worker's id.
    pub fn id(&self) -> &WorkerId {
        &self.card.worker
    }

    /// Returns what it published about itself.
    pub fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// Returns the connection to it.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the state of the connection.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    fn is_ready(&self) -> bool {
        matches!(*self.state.borrow(), State::Ready)
    }

    /// Returns what it last reported about its engines; zeros before.
    pub fn reported(&self) -> Load {
        self.client.load()
    }

    /// Returns how many requests were sent to it.
    pub fn decisions(&self) -> u64 {
        self.decisions.load(Ordering::Relaxed)
    }

    /// Returns how its engine and another know a hand-off.
    pub(crate) fn protocol(&self) -> HandOffProtocol {
        let handoff = self.card.handoff.as_ref();
        handoff.map(|handoff| handoff.protocol).unwrap_or_default()
    }

    /// Says whether KV can go from one of the two to the other: both ends must be the same build of the same
    /// model (vLLM compares them before it moves anything), and speak of it in the same way.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        let (own, other) = (&self.card, &other.card);
        let way = |card: &Card| {
            let handoff = card.handoff.as_ref();
            handoff.map(|handoff| (handoff.connector.clone(), handoff.protocol))
        };
        own.model.vllm_version == other.model.vllm_version
            && own.model.root == other.model.root
            && way(own) == way(other)
    }

    /// Says whether it may get a request now.
    pub fn availability(&self) -> Availability {
        if !self.is_ready() {
            return Availability::Absent;
        }
        if self.inhibition.lock().is_on() {
            Availability::Inhibited
        } else {
            Availability::Open
        }
    }

    pub(crate) fn chosen(&self) {
        self.decisions.fetch_add(1, Ordering::Relaxed);
    }
}

impl Inhibition {
    fn is_on(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }

    fn failed(&mut self) {
        let pause = INHIBIT_FIRST.saturating_mul(1 << self.failures.min(8));
        self.failures += 1;
        self.until = Some(Instant::now() + pause.min(INHIBIT_MOST));
    }

    /// Forgets earlier failures.
    fn answered(&mut self) {
        if self.failures != 0 {
            *self = Self::default();
        }
    }
}

/// Whom a failure says something about.
enum Blame {
    Nobody,
    /// One engine of the worker; the others may be well.
    Engine,
    Worker,
}

fn blame(code: Code) -> Blame {
    match code {
        Code::Unavailable | Code::EngineDead => Blame::Engine,
        Code::Draining | Code::Disconnected => Blame::Worker,
        // Its queue is full for this moment: the next request may find room, and the load that is
        // booked and reported keeps it from being chosen too often.
        Code::Overloaded
        | Code::InvalidRequest
        | Code::NotFound
        | Code::TooLarge
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Incompatible
        | Code::Unauthenticated
        | Code::Internal
        // Which side is at fault is not known.
        | Code::HandoffFailed => Blame::Nobody,
    }
}

/// A worker, or one rank of it, that had a request and failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    worker: WorkerId,
    /// Absent: all of it.
    dp_rank: Option<u32>,
}

impl Failed {
    /// Returns all of a worker.
    pub(crate) fn worker(id: WorkerId) -> Self {
        Self {
            worker: id,
            dp_rank: None,
        }
    }

    /// Says whether a target is it, or part of it.
    pub(crate) fn covers(&self, target: &Target) -> bool {
        self.worker == *target.worker.id()
            && (self.dp_rank.is_none() || self.dp_rank == target.dp_rank)
    }
}

/// Where a request can be sent: a worker, or one data-parallel rank of it.
pub struct Target {
    /// The process.
    pub worker: Arc<Worker>,
    /// The rank; absent where the worker has only one.
    pub dp_rank: Option<u32>,
    /// What this processor booked on it.
    pub ledger: Ledger,
    /// How much it runs at once.
    pub(crate) room: Room,
    /// Of this rank alone.
    inhibition: Mutex<Inhibition>,
    /// What is known of its cache, where that is looked at.
    entry: Option<Entry>,
}

impl Target {
    /// Returns the targets that a worker offers.
    pub(crate) fn of(
        worker: &Arc<Worker>,
        knowledge: Option<&Arc<Knowledge>>,
    ) -> impl Iterator<Item = Self> {
        let model = &worker.card.model;
        let ranks = model.dp_size.max(1);
        let blocks = model.kv_blocks / u64::from(ranks);
        let limit = |limit: u64| if limit == 0 { u64::MAX } else { limit };
        let room = Room {
            requests: limit(model.max_num_seqs.into()),
            kv_tokens: limit(blocks.saturating_mul(model.block_size.into())),
        };
        (0..ranks).map(move |rank| {
            let view = ViewId {
                worker: worker.id().clone(),
                dp_rank: rank,
            };
            Self {
                worker: Arc::clone(worker),
                dp_rank: (ranks > 1).then_some(rank),
                ledger: Ledger::default(),
                room,
                inhibition: Mutex::default(),
                entry: knowledge.map(|knowledge| Entry::new(knowledge, view, blocks)),
            }
        })
    }

    /// Says whether it may get a request now.
    pub fn availability(&self) -> Availability {
        match self.worker.availability() {
            Availability::Open if self.inhibition.lock().is_on() => Availability::Inhibited,
            of_worker => of_worker,
        }
    }

    /// Avoids it for a while, where the failure says something about it; returns who is to be avoided by a
    /// request that saw the failure.
    pub(crate) fn failed(&self, code: Code) -> Failed {
        let of_rank = match blame(code) {
            Blame::Engine => self.dp_rank,
            Blame::Worker | Blame::Nobody => None,
        };
        match (blame(code), of_rank) {
            (Blame::Nobody, _) => {}
            (_, Some(_)) => self.inhibition.lock().failed(),
            (_, None) => self.worker.inhibition.lock().failed(),
        }
        Failed {
            worker: self.worker.id().clone(),
            dp_rank: of_rank,
        }
    }

    /// Forgets earlier failures: it answered.
    pub(crate) fn answered(&self) {
        self.inhibition.lock().answered();
        self.worker.inhibition.lock().answered();
    }

    /// Returns what is known of its cache, where that is looked at.
    pub(crate) fn entry(&self) -> Option<&Entry> {
        self.entry.as_ref()
    }

    /// Returns the name of its cache.
    pub(crate) fn view(&self) -> ViewId {
        ViewId {
            worker: self.worker.id().clone(),
            dp_rank: self.dp_rank.unwrap_or(0),
        }
    }
}
