//! The workers that do the same for one model: who may take a request, who gets it, and what happens when
//! it fails there.
//!
//! A [`Pool`] holds targets (a worker, or one data-parallel rank of it). `Pool::dispatch` asks the router
//! for one, books the request on it, sends it and waits for the first delta. Until that delta nothing
//! has been shown to the client, so a failure that another worker may not share is repeated there.
//! Requests that take several workers, one after the other, are `fleet`'s: it chooses from several pools.

mod attempt;
mod choose;
mod policy;
mod route;
mod worker;

use std::sync::Arc;

use arc_swap::ArcSwap;
use metrics::Counter;
use parking_lot::Mutex;
use smallvec::SmallVec;
use stator_common::{Code, WorkerId};
use tokio::time::Instant;
use tracing::debug;

use crate::knowledge::Knowledge;
use choose::Deciding;

pub use attempt::Attempt;
pub(crate) use attempt::{ABORTED, Booked};
pub(crate) use choose::{Ask, Considered};
pub(crate) use policy::Stage;
pub use policy::{RouterMode, Routing};
pub(crate) use route::Route;
pub(crate) use worker::Failed;
pub use worker::{Availability, Target, Worker};

/// Workers that one request is sent to at most. Failures come in groups (a rolling restart drains
/// several); more than this many in a row is not the workers' fault.
const MAX_ATTEMPTS: usize = 4;

/// Why a request got no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct DispatchError {
    /// What it means for the client.
    pub code: Code,
    /// The reason in words.
    pub message: String,
    /// The request field at fault, where the worker named one.
    pub field: Option<String>,
    /// Whether an engine may have seen the request.
    pub(crate) began: bool,
}

impl DispatchError {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        self.code
    }

    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            field: None,
            began: true,
        }
    }
}

/// The workers that do the same for one model.
pub struct Pool {
    stage: Stage,
    routing: Routing,
    knowledge: Option<Arc<Knowledge>>,
    deciding: Mutex<Deciding>,
    targets: ArcSwap<Vec<Arc<Target>>>,
    retries: Counter,
    /// What sessions' ages are counted from.
    since: Instant,
}

impl Pool {
    /// Returns a pool without workers.
    ///
    /// - `knowledge`: what is known of the workers' caches, where that is looked at.
    /// - `seed`: of random choices.
    /// - `retries`: counts attempts that were repeated on another worker.
    pub(crate) fn new(
        stage: Stage,
        routing: Routing,
        knowledge: Option<Arc<Knowledge>>,
        seed: u64,
        retries: Counter,
    ) -> Self {
        let deciding = Deciding::new(routing.policy(stage), seed, routing.session_ttl);
        Self {
            stage,
            routing,
            knowledge,
            deciding: Mutex::new(deciding),
            targets: ArcSwap::default(),
            retries,
            since: Instant::now(),
        }
    }

    /// Adds a worker with its ranks, which are returned. Called by one task only.
    pub(crate) fn add(&self, worker: &Arc<Worker>) -> Vec<Arc<Target>> {
        let new = Target::of(worker, self.knowledge.as_ref()).map(Arc::new);
        let new: Vec<_> = new.collect();
        let mut targets = Vec::clone(&self.targets.load());
        targets.extend_from_slice(&new);
        self.targets.store(Arc::new(targets));
        new
    }

    /// Removes a worker; what runs on it goes on. Called by the task that adds.
    pub(crate) fn remove(&self, id: &WorkerId) {
        let targets = self.targets.load();
        let left = targets
            .iter()
            .filter(|target| target.worker.id() != id)
            .cloned()
            .collect();
        self.targets.store(Arc::new(left));
    }

    /// Returns the targets of now.
    pub fn targets(&self) -> Arc<Vec<Arc<Target>>> {
        self.targets.load_full()
    }

    /// Says whether a worker could take a request now.
    ///
    /// - `lora`: the adapter that the request names; empty: none.
    pub fn is_available(&self, lora: &str) -> bool {
        let targets = self.targets.load();
        targets.iter().any(|target| {
            target.availability() != Availability::Absent && target.worker.card().serves(lora)
        })
    }

    /// Sends a request to a worker and waits for its first delta, on another worker if need be.
    ///
    /// Dropping the future, or later the [`Attempt`], cancels the request in the engine.
    ///
    /// # Errors
    /// [`DispatchError`]: the request is at fault, or nobody could take it.
    pub(crate) async fn dispatch(&self, ask: Ask<'_>) -> Result<Attempt, DispatchError> {
        let request = ask.request;
        let mut tried: SmallVec<[Failed; MAX_ATTEMPTS]> = SmallVec::new();
        let mut last: Option<DispatchError> = None;
        loop {
            let ask = Ask {
                tried: &tried,
                ..ask
            };
            let Some(attempt) = self.choose(&ask) else {
                // The failure of a worker that was there says more than the absence of others.
                return Err(last.unwrap_or_else(|| nobody(ask.pinned)));
            };
            let target = attempt.target().clone();
            let error = match attempt.begin(request).await {
                Ok(attempt) => return Ok(attempt),
                Err(error) => error,
            };
            if !error.code.is_retryable() {
                return Err(error);
            }
            debug!(worker = %target.worker.id(), request = request.request_id, %error, "attempt failed before its first token");
            tried.push(target.failed(error.code));
            if tried.len() == MAX_ATTEMPTS {
                return Err(error);
            }
            self.retries.increment(1);
            last = Some(error);
        }
    }

    /// Counts an attempt that is repeated.
    pub(crate) fn retried(&self) {
        self.retries.increment(1);
    }
}

/// Returns the error of a request that nobody can take.
pub(crate) fn nobody(pinned: Option<&WorkerId>) -> DispatchError {
    let message = match pinned {
        None => "no worker of this model is connected".to_owned(),
        Some(worker) => format!("the worker {worker} does not take this request"),
    };
    DispatchError::new(Code::Unavailable, message)
}
