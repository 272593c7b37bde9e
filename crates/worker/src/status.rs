//! How a worker is: its engines' states and loads, for processors, people and machines.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use parking_lot::Mutex;
use serde::Serialize;
use stator_common::proto::worker::Load;
use stator_engine::{Phase, SchedulerStats, State};
use tokio::sync::Notify;

/// The loads of a worker's engines.
pub(crate) struct Loads {
    ranks: Mutex<Vec<Load>>,
    generated: AtomicU64,
    changed: AtomicBool,
    notify: Notify,
}

impl Loads {
    pub(crate) fn new(ranks: u32) -> Self {
        Self {
            ranks: Mutex::new(vec![Load::default(); ranks as usize]),
            generated: AtomicU64::new(0),
            changed: AtomicBool::new(false),
            notify: Notify::new(),
        }
    }

    /// Takes what the scheduler of a rank says after a step.
    pub(crate) fn set(&self, rank: u32, stats: &SchedulerStats) {
        let load = Load {
            running: stats.running,
            waiting: stats.waiting,
            kv_usage: stats.kv_usage as f32,
        };
        let mut ranks = self.ranks.lock();
        let slot = &mut ranks[rank as usize];
        if *slot != load {
            *slot = load;
            drop(ranks);
            self.mark();
        }
    }

    /// At most so many requests are left in a rank: the scheduler says nothing after an abort, if there is
    /// nothing else to run.
    pub(crate) fn cap(&self, rank: u32, requests: usize) {
        let most = u32::try_from(requests).unwrap_or(u32::MAX);
        let mut ranks = self.ranks.lock();
        let load = &mut ranks[rank as usize];
        if most == 0 {
            *load = Load::default();
        } else {
            load.running = load.running.min(most);
            load.waiting = load.waiting.min(most - load.running);
        }
        drop(ranks);
        self.mark();
    }

    /// Returns the load of each rank.
    pub(crate) fn ranks(&self) -> Vec<Load> {
        self.ranks.lock().clone()
    }

    /// An engine that is gone has no load.
    pub(crate) fn clear(&self, rank: u32) {
        self.ranks.lock()[rank as usize] = Load::default();
        self.mark();
    }

    /// Counts generated tokens.
    pub(crate) fn generated(&self, tokens: u64) {
        self.generated.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Returns the load of the worker: requests summed, KV use of the fullest rank.
    pub(crate) fn total(&self) -> Load {
        let ranks = self.ranks.lock();
        ranks.iter().fold(Load::default(), |total, load| Load {
            running: total.running + load.running,
            waiting: total.waiting + load.waiting,
            kv_usage: total.kv_usage.max(load.kv_usage),
        })
    }

    /// Waits until the load differs from the one that was last waited for. Cancel safe.
    pub(crate) async fn changed(&self) {
        while !self.changed.swap(false, Ordering::AcqRel) {
            self.notify.notified().await;
        }
    }

    /// Waits until no engine holds KV for anybody, by its own word. For whoever waits for changes alone.
    /// Cancel safe.
    pub(crate) async fn unused(&self) {
        while self.total().kv_usage > 0.0 {
            self.changed().await;
        }
    }

    fn mark(&self) {
        if !self.changed.swap(true, Ordering::AcqRel) {
            self.notify.notify_one();
        }
    }
}

/// What `GET /status` answers.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    state: &'static str,
    /// What a starting engine is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<String>,
    /// How far it is with that, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<f32>,
    /// Why there is no engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    worker: String,
    role: String,
    models: Vec<String>,
    engines: usize,
    engines_ready: usize,
    requests: usize,
    running: u32,
    waiting: u32,
    kv_usage: f32,
    generated_tokens: u64,
}

/// Everything that tells how a worker is.
pub(crate) struct Health {
    pub(crate) worker: String,
    pub(crate) role: String,
    pub(crate) models: Vec<String>,
    pub(crate) loads: Arc<Loads>,
    /// One per rank.
    pub(crate) engines: Mutex<Vec<State>>,
    pub(crate) draining: AtomicBool,
    pub(crate) requests: Arc<crate::requests::Count>,
}

impl Health {
    /// Says whether requests are taken.
    pub(crate) fn is_ready(&self) -> bool {
        !self.draining.load(Ordering::Acquire) && self.engines.lock().contains(&State::Ready)
    }

    pub(crate) fn status(&self) -> Status {
        let engines = self.engines.lock();
        let ready = engines
            .iter()
            .filter(|state| **state == State::Ready)
            .count();
        let starting = engines.iter().find_map(|state| match state {
            State::Starting(phase) => Some(phase.clone()),
            State::Ready | State::Dead(_) => None,
        });
        let dead = engines.iter().find_map(|state| match state {
            State::Dead(reason) => Some(reason.to_string()),
            State::Starting(_) | State::Ready => None,
        });
        let state = if self.draining.load(Ordering::Acquire) {
            "draining"
        } else if ready > 0 {
            "ready"
        } else if starting.is_some() {
            "starting"
        } else {
            "dead"
        };
        let load = self.loads.total();
        Status {
            state,
            progress: match &starting {
                Some(Phase::LoadingWeights { percent }) => Some(f32::from(*percent) / 100.0),
                _ => None,
            },
            phase: starting.map(|phase| phase.to_string()),
            reason: dead,
            worker: self.worker.clone(),
            role: self.role.clone(),
            models: self.models.clone(),
            engines: engines.len(),
            engines_ready: ready,
            requests: self.requests.get(),
            running: load.running,
            waiting: load.waiting,
            kv_usage: load.kv_usage,
            generated_tokens: self.loads.generated.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(running: u32, kv_usage: f64) -> SchedulerStats {
        SchedulerStats {
            running,
            kv_usage,
            ..SchedulerStats::default()
        }
    }

    #[tokio::test]
    async fn an_engine_that_keeps_kv_for_others_is_not_unused() {
        let loads = Arc::new(Loads::new(2));
        loads.set(1, &stats(0, 0.25));
        let waiting = tokio::spawn({
            let loads = loads.clone();
            async move { loads.unused().await }
        });
        // Until the waiting one has looked at that.
        while loads.changed.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        loads.set(1, &stats(0, 0.0));
        waiting.await.expect("no panic");
    }

    #[tokio::test]
    async fn the_load_of_a_worker_is_the_sum_of_its_ranks_and_the_fullest_cache() {
        let loads = Loads::new(2);
        loads.set(0, &stats(3, 0.25));
        loads.set(1, &stats(4, 0.5));
        loads.changed().await;
        let total = loads.total();
        assert_eq!((total.running, total.kv_usage), (7, 0.5));
        loads.cap(0, 2);
        assert_eq!(loads.total().running, 6);
        loads.set(0, &stats(3, 0.25));
        loads.clear(1);
        loads.changed().await;
        assert_eq!(loads.total().running, 3);
    }
}
