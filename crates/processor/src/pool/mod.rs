//! The workers that do the same for one model: who may take a request, who gets it, and what happens when
//! it fails there.
//!
//! A [`Pool`] holds targets (a worker, or one data-parallel rank of it). [`Pool::dispatch`] asks the router
//! for one, books the request on it, sends it and waits for the first delta. Until that delta nothing
//! has been shown to the client, so a failure that another worker may not share is repeated there.
//! Requests that take several workers, one after the other, are `fleet`'s: it chooses from several pools.

mod attempt;
mod worker;

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use metrics::Counter;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use stator_common::proto::worker::GenerateRequest;
use stator_common::{Code, WorkerId};
use stator_router::{Candidate, Measure, Policy, Router};
use tracing::debug;

pub use attempt::Attempt;
pub(crate) use attempt::{ABORTED, Booked};
pub use worker::{Availability, Target, Worker};

/// Workers that one request is sent to at most. Failures come in groups (a rolling restart drains
/// several); more than this many in a row is not the workers' fault.
const MAX_ATTEMPTS: usize = 4;

/// How a worker is chosen for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterMode {
    /// One after the other.
    RoundRobin,
    /// Each with the same probability.
    Random,
    /// The one with the fewest unfinished requests.
    LeastLoaded,
    /// By what each worker's KV cache holds. Not there yet: the one with the fewest tokens to compute and to
    /// hold, which is said at start-up.
    Kv,
}

impl RouterMode {
    pub(crate) fn policy(self) -> Policy {
        match self {
            Self::RoundRobin => Policy::RoundRobin,
            Self::Random => Policy::Random,
            Self::LeastLoaded => Policy::LeastLoaded(Measure::Requests),
            Self::Kv => Policy::LeastLoaded(Measure::Tokens),
        }
    }
}

impl fmt::Display for RouterMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
            Self::Kv => "kv",
        })
    }
}

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

/// What a target is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) request: &'a GenerateRequest,
    /// Workers that had it and failed.
    pub(crate) tried: &'a [WorkerId],
    /// The one that gets it if it can.
    pub(crate) preferred: Option<&'a WorkerId>,
    /// The worker at the other end of the hand-off.
    pub(crate) partner: Option<&'a Worker>,
    /// Whether the prompt is computed elsewhere.
    pub(crate) prefilled: bool,
}

impl<'a> Ask<'a> {
    /// Asks for all of a request.
    pub(crate) fn new(request: &'a GenerateRequest, tried: &'a [WorkerId]) -> Self {
        Self {
            request,
            tried,
            preferred: None,
            partner: None,
            prefilled: false,
        }
    }

    fn takes(&self, target: &Target) -> bool {
        let asked = self.request.dp_rank;
        !self.tried.contains(target.worker.id())
            && asked.is_none_or(|rank| target.dp_rank.is_none_or(|own| own == rank))
            && self.partner.is_none_or(|other| target.worker.fits(other))
    }
}

/// The workers that do the same for one model.
pub struct Pool {
    router: Mutex<Router>,
    targets: ArcSwap<Vec<Arc<Target>>>,
    retries: Counter,
}

impl Pool {
    /// Returns a pool without workers.
    ///
    /// - `seed`: of the random policy.
    /// - `retries`: counts attempts that were repeated on another worker.
    pub fn new(policy: Policy, seed: u64, retries: Counter) -> Self {
        Self {
            router: Mutex::new(Router::new(policy, seed)),
            targets: ArcSwap::default(),
            retries,
        }
    }

    /// Adds a worker with its ranks. Called by one task only.
    pub(crate) fn add(&self, worker: &Arc<Worker>) {
        let mut targets = Vec::clone(&self.targets.load());
        targets.extend(Target::of(worker).map(Arc::new));
        self.targets.store(Arc::new(targets));
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
    pub fn is_available(&self) -> bool {
        self.targets
            .load()
            .iter()
            .any(|target| target.worker.availability() != Availability::Absent)
    }

    /// Sends a request to a worker and waits for its first delta, on another worker if need be.
    ///
    /// Dropping the future, or later the [`Attempt`], cancels the request in the engine.
    ///
    /// # Errors
    /// [`DispatchError`]: the request is at fault, or nobody could take it.
    pub async fn dispatch(&self, request: &GenerateRequest) -> Result<Attempt, DispatchError> {
        let mut tried: SmallVec<[WorkerId; MAX_ATTEMPTS]> = SmallVec::new();
        let mut last: Option<DispatchError> = None;
        loop {
            let Some(attempt) = self.choose(&Ask::new(request, &tried)) else {
                // The failure of a worker that was there says more than the absence of others.
                return Err(last.unwrap_or_else(nobody));
            };
            let worker = attempt.worker().clone();
            let error = match attempt.begin(request).await {
                Ok(attempt) => return Ok(attempt),
                Err(error) => error,
            };
            if !error.code.is_retryable() {
                return Err(error);
            }
            worker.failed(error.code);
            debug!(worker = %worker.id(), request = request.request_id, %error, "attempt failed before its first token");
            tried.push(worker.id().clone());
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

    /// Chooses a target and books the request on it. Absent: nobody can take it.
    pub(crate) fn choose(&self, ask: &Ask<'_>) -> Option<Booked> {
        let targets = self.targets.load();
        let of = |wanted: Availability| -> SmallVec<[&Arc<Target>; 16]> {
            let open = targets
                .iter()
                .filter(|target| target.worker.availability() == wanted);
            open.filter(|target| ask.takes(target)).collect()
        };
        let mut open = of(Availability::Open);
        if open.is_empty() {
            // All that are connected failed a moment ago; one of them is still the best there is.
            open = of(Availability::Inhibited);
        }
        if let Some(preferred) = ask.preferred
            && open.iter().any(|target| target.worker.id() == preferred)
        {
            open.retain(|target| target.worker.id() == preferred);
        }
        let candidates: SmallVec<[Candidate<'_>; 16]> = open
            .iter()
            .map(|target| Candidate {
                worker: target.worker.id(),
                dp_rank: target.dp_rank,
                load: target.ledger.load(),
            })
            .collect();
        let prompt = attempt::Prompt::new(ask.request);
        let mut router = self.router.lock();
        let choice = router.choose(&candidates, &prompt).ok()?;
        // Booked before the router is let go of, so that the next decision sees it.
        let booked = Booked::new(open[choice.index], prompt.len(), ask.prefilled);
        drop(router);
        debug!(worker = %booked.worker().id(), request = ask.request.request_id, reason = %choice.reason, "routed");
        Some(booked)
    }
}

fn nobody() -> DispatchError {
    DispatchError::new(Code::Unavailable, "no worker of this model is connected")
}
