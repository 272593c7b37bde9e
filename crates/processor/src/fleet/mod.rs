//! All workers of one model, by role, and the way of a request through them.
//!
//! A request that aggregated workers serve goes to one of them and that is all. Where prefill and decode
//! are different workers it is a chain of legs: [`handoff`](self) runs prefill, then decode, and answers for what lies
//! in between: `queue` is where prompts wait, if they do; `held` is KV that a prefill engine keeps and that must be fetched or given back; `siblings` are
//! the choices of one prompt, which share the work on it. Whether a prompt is worth a hand-off
//! is `stator-router`'s to decide. Which worker of a role takes a leg is [`Pool`]'s.

mod explain;
mod handoff;
mod held;
mod late;
mod prefill;
mod queue;
mod siblings;

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use stator_common::card::{HandOffProtocol, Role};
use stator_common::nats::Nats;
use stator_common::plane::Unclaimed;
use stator_common::proto::worker::GenerateRequest;
use stator_common::tickets::LineName;
use stator_common::{Code, WorkerId};
use stator_router::{BlockHash, Conditional, Measured};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::knowledge::Knowledge;
use crate::metrics::ModelMetrics;
use crate::pool::{Ask, Attempt, DispatchError, Pool, Route, Routing, Stage, Target, Worker};
use held::Releaser;
pub(crate) use queue::LOOK_AGAIN;
use queue::Queue;
use queue::desk::Clerk;
pub(crate) use siblings::Siblings;

/// What one choice asks for.
#[derive(Clone)]
pub(crate) struct Order {
    pub(crate) request: Arc<GenerateRequest>,
    /// Names of the prompt's blocks ([`Fleet::hash`]).
    pub(crate) blocks: Arc<[BlockHash]>,
    /// What the request says about where it goes, if it does.
    pub(crate) route: Option<Arc<Route>>,
    /// The other choices of the same prompt.
    pub(crate) siblings: Arc<Siblings>,
    /// When the client's patience ends.
    pub(crate) deadline: Option<Instant>,
}

/// Which way requests take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One worker computes the prompt and generates.
    Aggregated,
    /// A prefill worker computes the prompt, a decode worker generates.
    Disaggregated,
}

/// When a prompt is given to a prefill worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PrefillDispatch {
    /// At once, to the one where it costs least; it waits there.
    Push,
    /// When one has room; it waits at the processor.
    Queue,
}

/// How prompts come to prefill workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// When they do not.
    pub conditional: Conditional,
    /// When they do.
    pub dispatch: PrefillDispatch,
    /// How many may wait at the processor.
    pub most_waiting: usize,
}

/// All workers of one model.
pub struct Fleet {
    agg: Pool,
    prefill: Arc<Pool>,
    decode: Arc<Pool>,
    rules: Rules,
    /// Where prompts wait for prefill workers, if not there.
    queue: Option<Arc<Queue>>,
    measured: Arc<Mutex<Measured>>,
    /// Sees to the line that processors share, if prompts wait.
    clerk: Option<DropGuard>,
    /// What is known of the workers' caches, where routing looks at that.
    knowledge: Option<Arc<Knowledge>>,
    metrics: ModelMetrics,
}

impl Fleet {
    /// Returns a fleet without workers.
    ///
    /// - `knowledge`: what is known of the workers' caches, where routing looks at that.
    /// - `seed`: of random choices.
    pub(crate) fn new(
        routing: Routing,
        rules: Rules,
        knowledge: Option<Arc<Knowledge>>,
        seed: u64,
        metrics: ModelMetrics,
    ) -> Self {
        let pool = |stage| {
            let retries = metrics.retries.clone();
            Pool::new(stage, routing, knowledge.clone(), seed, retries)
        };
        let prefill = Arc::new(pool(Stage::Prefill));
        let decode = Arc::new(pool(Stage::Decode));
        let waited = &metrics.handoff.waited;
        let measured = Arc::default();
        let queue = match rules.dispatch {
            PrefillDispatch::Push => None,
            PrefillDispatch::Queue => {
                let measured = Arc::clone(&measured);
                let queue = Queue::new(&prefill, &decode, &rules, waited.clone(), measured);
                Some(Arc::new(queue))
            }
        };
        Self {
            agg: pool(Stage::Whole),
            prefill,
            decode,
            rules,
            queue,
            measured,
            clerk: None,
            knowledge,
            metrics,
        }
    }

    /// Lets prompts that wait for prefill workers stand in a line that processors share, wherever these workers are reached
    /// over NATS. Needs a tokio runtime.
    pub(crate) fn share(&mut self, nats: &Nats, line: LineName) {
        if let Some(queue) = &self.queue {
            let stop = CancellationToken::new();
            let clerk = Clerk::new(Arc::clone(queue), nats.clone(), line);
            tokio::spawn(stop.clone().run_until_cancelled_owned(clerk.run()));
            self.clerk = Some(stop.drop_guard());
        }
    }

    /// Says whether prompts wait in a line that processors share.
    pub fn is_shared(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.is_shared())
    }

    /// Returns the names of a prompt's blocks, once for all who look at them; none where nobody does.
    ///
    /// - `tokens`: those of the request.
    pub(crate) fn hash(&self, request: &GenerateRequest, tokens: &[u32]) -> Arc<[BlockHash]> {
        match &self.knowledge {
            Some(knowledge) => knowledge.hash(request, tokens),
            None => Arc::from([]),
        }
    }

    /// Forgets what was sent to workers too long ago. To be called about once a second.
    pub(crate) fn expire(&self) {
        if let Some(knowledge) = &self.knowledge {
            knowledge.expire();
        }
    }

    /// Adds a worker and returns its targets. Called by one task only. Encode workers take no part yet.
    pub(crate) fn add(&self, worker: &Arc<Worker>) -> Vec<Arc<Target>> {
        let pool = self.pool(worker.card().role);
        pool.map(|pool| pool.add(worker)).unwrap_or_default()
    }

    /// Sees to prompts that wait for workers. To be called every [`LOOK_AGAIN`].
    pub(crate) fn look(&self) {
        if let Some(queue) = &self.queue {
            queue.look();
        }
    }

    /// Returns how many prompts wait here for prefill workers, and their tokens that no worker has; absent where they
    /// wait at the workers.
    pub fn waiting(&self) -> Option<(usize, u64)> {
        self.queue.as_ref().map(|queue| queue.waiting())
    }

    /// Removes a worker; what runs on it goes on. Called by the task that adds.
    pub(crate) fn remove(&self, id: &WorkerId) {
        for pool in self.pools() {
            pool.remove(id);
        }
    }

    /// Returns the targets of now, of all roles.
    pub fn targets(&self) -> Vec<Arc<Target>> {
        let targets = self.pools().into_iter().map(|pool| pool.targets());
        targets.flat_map(|of_pool| Vec::clone(&of_pool)).collect()
    }

    /// Says whether a request would find the workers that it needs.
    pub fn is_available(&self) -> bool {
        self.way("").is_ok()
    }

    /// Says what keeps requests from being served, if something does.
    pub fn lacks(&self) -> Option<&'static str> {
        self.way("").err()
    }

    /// Sends a request to the workers that it needs and waits for the first delta of its answer.
    ///
    /// Dropping the future, or later the [`Attempt`], cancels the request in whatever engine has it, and gives back
    /// KV that an engine keeps for it.
    ///
    /// # Errors
    /// [`DispatchError`]: the request is at fault, its time is over, or nobody could take it.
    pub(crate) async fn dispatch(&self, order: &Order) -> Result<Attempt, DispatchError> {
        let Some(deadline) = order.deadline else {
            return self.dispatch_any(order).await;
        };
        let late = |_| {
            DispatchError::new(
                Code::DeadlineExceeded,
                "not begun within the request's time",
            )
        };
        timeout_at(deadline, self.dispatch_any(order))
            .await
            .map_err(late)?
    }

    /// Returns what takes deltas with KV parameters that nobody reads, from workers of a protocol.
    pub(crate) fn unclaimed(&self, protocol: HandOffProtocol) -> Unclaimed {
        let releaser = self.releaser(protocol);
        Arc::new(move |delta| releaser.release(delta.kv_transfer_params))
    }

    fn releaser(&self, protocol: HandOffProtocol) -> Releaser {
        Releaser::new(&self.decode, protocol, &self.metrics.handoff)
    }

    async fn dispatch_any(&self, order: &Order) -> Result<Attempt, DispatchError> {
        let lora = &order.request.lora;
        let way = self.way(lora);
        let way = way.map_err(|lacks| DispatchError::new(Code::Unavailable, lacks))?;
        match self.dispatch_by(way, order).await {
            Err(error) if error.code.is_retryable() => match self.way(lora) {
                // The workers of the one way left meanwhile, and those of the other are there.
                Ok(now) if now != way => self.dispatch_by(now, order).await,
                // Prefill and decode workers that do not get on with each other, beside others that could.
                Ok(Way::Disaggregated) if self.agg.is_available(lora) => {
                    self.dispatch_by(Way::Aggregated, order).await
                }
                Ok(_) | Err(_) => Err(error),
            },
            done => done,
        }
    }

    async fn dispatch_by(&self, way: Way, order: &Order) -> Result<Attempt, DispatchError> {
        match (way, order.deadline) {
            (Way::Disaggregated, _) => self.hand_off(order).await,
            (Way::Aggregated, None) => self.agg.dispatch(order.ask(&order.request)).await,
            (Way::Aggregated, Some(_)) => {
                let request = GenerateRequest {
                    deadline_ms: order.time_left(),
                    ..GenerateRequest::clone(&order.request)
                };
                self.agg.dispatch(order.ask(&request)).await
            }
        }
    }

    /// - `lora`: the adapter that a request names; each of its workers must serve it.
    fn way(&self, lora: &str) -> Result<Way, &'static str> {
        // In this order, so that aggregated workers can be replaced by the two halves, and the other way
        // round, while requests come.
        let is_available = |pool: &Pool| pool.is_available(lora);
        let lacks = |model: &'static str, adapter: &'static str| {
            Err(if lora.is_empty() { model } else { adapter })
        };
        match (is_available(&self.prefill), is_available(&self.decode)) {
            (true, true) => Ok(Way::Disaggregated),
            _ if is_available(&self.agg) => Ok(Way::Aggregated),
            (true, false) => lacks(
                "prefill workers are connected, but no decode worker is",
                "prefill workers with this adapter are connected, but no decode worker with it is",
            ),
            (false, true) => lacks(
                "decode workers are connected, but no prefill worker is",
                "decode workers with this adapter are connected, but no prefill worker with it is",
            ),
            (false, false) => lacks(
                "no worker of this model is connected",
                "no worker with this adapter is connected",
            ),
        }
    }

    fn pools(&self) -> [&Pool; 3] {
        [&self.agg, &self.prefill, &self.decode]
    }

    fn pool(&self, role: Role) -> Option<&Pool> {
        match role {
            Role::Agg => Some(&self.agg),
            Role::Prefill => Some(&self.prefill),
            Role::Decode => Some(&self.decode),
            Role::Encode => None,
        }
    }
}

impl Order {
    /// Asks for a worker that answers.
    ///
    /// - `request`: what it is sent.
    fn ask<'a>(&'a self, request: &'a GenerateRequest) -> Ask<'a> {
        let route = self.route.as_deref();
        Ask {
            blocks: &self.blocks,
            route,
            pinned: route.and_then(|route| route.worker.as_ref()),
            ..Ask::new(request, &[])
        }
    }

    /// Asks for a worker that computes the prompt for another.
    fn ask_prefill<'a>(&'a self, request: &'a GenerateRequest) -> Ask<'a> {
        let route = self.route.as_deref();
        Ask {
            pinned: route.and_then(|route| route.prefill_worker.as_ref()),
            ..self.ask(request)
        }
    }

    /// Returns the prompt alone, for who looks for a worker to compute it.
    fn prompt(&self) -> GenerateRequest {
        GenerateRequest {
            // A rank that the client named is one of the engine that answers.
            dp_rank: None,
            prompt_tokens: self.request.prompt_tokens.clone(),
            lora: self.request.lora.clone(),
            ..GenerateRequest::default()
        }
    }

    /// Returns the milliseconds that are left, as workers are told them.
    fn time_left(&self) -> Option<u64> {
        let left = self.deadline?.saturating_duration_since(Instant::now());
        Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }
}
