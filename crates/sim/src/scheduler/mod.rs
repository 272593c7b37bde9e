//! Continuous batching: which requests run in the next step, and what the step brings.
//!
//! The order of things is vLLM's (v1/core/sched/scheduler.py, 0.32): running requests first, then
//! waiting ones while the token budget and the blocks last; a prompt longer than what is left of
//! the budget is computed in chunks; when blocks run out, the request that came last gives its
//! blocks back and starts again later. Blocks become findable when a step that fills them is
//! planned.
//!
//! Pure: a step is planned ([`Scheduler::plan`]), somebody else lets the time pass that it would take, and then
//! it is carried out ([`Scheduler::commit`]). Requests may be aborted in between.

mod state;
mod step;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

pub use state::{Event, EventKind, Finish, KvHandle, Output, PrefillStats, Refusal, Stats};
use state::{State, Status};
pub use step::Plan;

use crate::cache::{BlockId, BlockPool, CacheEvent};
use crate::model::{Chain, Model};
use crate::request::{Request, Transfer};
use crate::wire::msgpack::Value;

/// Names a request among all that an engine ever had; ids may come back, these do not.
pub type Serial = u64;

/// What an engine can hold and do in a step.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
    /// Blocks in the pool, the placeholder included.
    pub num_blocks: usize,
    pub prefix_caching: bool,
    /// Whether cache events are recorded.
    pub events: bool,
    /// Run by priority, not by arrival.
    pub by_priority: bool,
    /// Whether there is a KV connector; without one `kv_transfer_params` are ignored.
    pub connector: bool,
    /// What follows a failed fetch of remote KV: computing the prompt here, or an error.
    pub recompute_failed_loads: bool,
    pub vocab: u32,
}

/// Whether new work is taken up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pause {
    #[default]
    Running,
    /// What runs goes on, what waits keeps waiting.
    New,
    /// Nothing moves.
    All,
}

/// A request whose prompt's KV has to be fetched before it can run.
#[derive(Clone, Debug)]
pub struct Load {
    pub serial: Serial,
    pub params: Value,
}

/// A request that was ended from outside.
#[derive(Clone, Debug)]
pub struct Aborted {
    pub id: Arc<str>,
    pub client: usize,
}

/// An ADD that a real engine does not survive: it asserts that ids are unique.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("duplicate request id {0}")]
pub struct DuplicateId(pub Arc<str>);

/// All requests of one engine and the blocks that they use.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    model: Model,
    pool: BlockPool,
    requests: HashMap<Serial, State>,
    ids: HashMap<Arc<str>, Serial>,
    waiting: VecDeque<Serial>,
    /// Waiting requests whose KV was fetched. They hold blocks, so they go first: who waits for
    /// blocks must not stand before those who have them.
    fetched: VecDeque<Serial>,
    running: Vec<Serial>,
    /// Blocks kept for another engine, by the id of the request that filled them.
    pinned: HashMap<Arc<str>, Vec<BlockId>>,
    pause: Pause,
    next: Serial,
    stats: Stats,
    /// Outputs that no step makes: failed loads.
    extra: Vec<Output>,
}

impl Scheduler {
    #[must_use]
    pub fn new(limits: Limits, model: Model) -> Self {
        let pool = BlockPool::new(limits.num_blocks, limits.prefix_caching, limits.events);
        Self {
            limits,
            model,
            pool,
            requests: HashMap::new(),
            ids: HashMap::new(),
            waiting: VecDeque::new(),
            fetched: VecDeque::new(),
            running: Vec::new(),
            pinned: HashMap::new(),
            pause: Pause::Running,
            next: 0,
            stats: Stats::default(),
            extra: Vec::new(),
        }
    }

    /// Queues a request. `now`: seconds on the engine's monotonic clock.
    ///
    /// # Errors
    /// [`DuplicateId`]; a real engine ends there.
    pub fn add(&mut self, request: Request, now: f64) -> Result<Serial, DuplicateId> {
        if self.ids.contains_key(&request.id) {
            return Err(DuplicateId(request.id));
        }
        let serial = self.next;
        self.next += 1;
        self.ids.insert(request.id.clone(), serial);
        let start = self
            .model
            .start(request.lora.as_ref().map(|(_, name)| name.as_str()));
        let mut state = State::new(request, start);
        if !self.limits.connector {
            state.request.transfer = Transfer::None;
        }
        state.event(EventKind::Queued, now);
        self.requests.insert(serial, state);
        self.enqueue(serial);
        Ok(serial)
    }

    /// Ends a request without an output; `None` if there is none of that id.
    pub fn abort(&mut self, id: &str) -> Option<Aborted> {
        let serial = *self.ids.get(id)?;
        let state = self.remove(serial);
        self.pool.release(&state.blocks);
        Some(Aborted {
            id: state.request.id,
            client: state.request.client,
        })
    }

    /// Ends every request.
    pub fn abort_all(&mut self) -> Vec<Aborted> {
        let ids: Vec<Arc<str>> = self.ids.keys().cloned().collect();
        ids.iter().filter_map(|id| self.abort(id)).collect()
    }

    /// A fetch has ended: with the state after the fetched tokens and their number, or not at all.
    pub fn loaded(&mut self, serial: Serial, result: Option<(Chain, usize)>) {
        let Some(state) = self.requests.get_mut(&serial) else {
            return;
        };
        if state.status != Status::Loading {
            return;
        }
        state.request.transfer = Transfer::None;
        match result {
            Some((chain, tokens)) => {
                let tokens = tokens.min(state.prompt_len());
                state.chain = chain.extend_all(&state.tokens[tokens..]);
                state.computed = state.prompt_len();
                state.store(&mut self.pool, self.limits.block_size);
                // One token is computed here, or there would be nothing to sample from.
                state.computed -= 1;
            }
            None if self.limits.recompute_failed_loads => {
                state.computed = state.cached.min(state.prompt_len() - 1);
            }
            None => {
                let state = self.remove(serial);
                self.pool.release(&state.blocks);
                self.extra.push(state.failed());
                return;
            }
        }
        state.status = Status::Waiting;
        self.fetched.push_back(serial);
    }

    /// Gives back blocks that were kept for another engine. False if none were kept.
    pub fn unpin(&mut self, id: &str) -> bool {
        match self.pinned.remove(id) {
            Some(blocks) => {
                self.pool.release(&blocks);
                true
            }
            None => false,
        }
    }

    /// Forgets the prefix cache. False, and nothing done, while blocks are in use, unless running
    /// requests may start again from nothing.
    pub fn reset_prefix_cache(&mut self, restart_running: bool, now: f64) -> bool {
        if restart_running {
            while let Some(serial) = self.running.pop() {
                self.preempt(serial, now);
            }
        }
        self.pool.reset()
    }

    pub fn set_pause(&mut self, pause: Pause) {
        self.pause = pause;
    }

    #[must_use]
    pub fn pause(&self) -> Pause {
        self.pause
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.requests.len()
    }

    /// Whether a request has not ended.
    #[must_use]
    pub fn is_live(&self, serial: Serial) -> bool {
        self.requests.contains_key(&serial)
    }

    /// Requests that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Blocks kept for other engines.
    #[must_use]
    pub fn pinned_blocks(&self) -> usize {
        self.pinned.values().map(Vec::len).sum()
    }

    #[must_use]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The load now, and what the prefix cache did since the last call.
    pub fn take_stats(&mut self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.requests.len() - self.running.len(),
            kv_usage: self.pool.usage(),
            ..std::mem::take(&mut self.stats)
        }
    }

    /// What happened to the cache since the last call.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.pool.take_events()
    }

    /// Puts a request where it belongs among those that wait: by arrival, so that one that had to
    /// give way is first again, or by priority and then arrival.
    fn enqueue(&mut self, serial: Serial) {
        let by_priority = self.limits.by_priority;
        let key = |serial: Serial| {
            let priority = self.requests[&serial].request.priority;
            (if by_priority { priority } else { 0 }, serial)
        };
        let place = self
            .waiting
            .partition_point(|&other| key(other) < key(serial));
        self.waiting.insert(place, serial);
    }

    fn remove(&mut self, serial: Serial) -> State {
        let state = self
            .requests
            .remove(&serial)
            .expect("a serial number in use names a request");
        self.ids.remove(&state.request.id);
        self.waiting.retain(|&other| other != serial);
        self.fetched.retain(|&other| other != serial);
        self.running.retain(|&other| other != serial);
        state
    }
}

#[cfg(test)]
mod tests;
