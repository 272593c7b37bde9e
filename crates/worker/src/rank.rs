//! One engine slot of a worker: starts an engine, notices its death, starts the next one.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use stator_common::{Code, plane::Connection};
use stator_engine::{Config as EngineConfig, DeadReason, Engine, Phase, StartError, State};
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    Plan,
    metrics::{EngineMetrics, WorkerMetrics},
    requests::{Requests, Running},
    sink::Sink,
    status::Health,
};

/// The wait before an engine that died is started again; it doubles up to [`BACK_OFF_MOST`].
pub(crate) const BACK_OFF_FIRST: Duration = Duration::from_secs(1);

/// The longest wait: a machine that lost its device should not load weights all the time.
pub(crate) const BACK_OFF_MOST: Duration = Duration::from_secs(60);

/// How long a restart waits for the engine of before to dial in again: it was just given up, and where it
/// still runs it redials ten times a second.
const ADOPT_AGAIN: Duration = Duration::from_secs(1);

/// An engine that ran this long was well; the next wait is the first again.
pub(crate) const WELL_AFTER: Duration = Duration::from_secs(300);

/// A running engine and its requests.
pub(crate) struct Active {
    pub(crate) rank: u32,
    pub(crate) engine: Engine,
    pub(crate) requests: Arc<Requests>,
}

/// A slot for one engine.
pub(crate) struct Rank {
    pub(crate) index: u32,
    pub(crate) config: EngineConfig,
    pub(crate) model: String,
    pub(crate) plan: Arc<dyn Plan>,
    pub(crate) health: Arc<Health>,
    pub(crate) metrics: WorkerMetrics,
    /// Absent while there is no engine.
    pub(crate) active: Mutex<Option<Arc<Active>>>,
    /// Counts changes of `active`, for whoever publishes what the worker can do.
    pub(crate) changed: watch::Sender<u64>,
}

impl Rank {
    /// Returns the engine that takes requests now.
    pub(crate) fn active(&self) -> Option<Arc<Active>> {
        self.active.lock().clone()
    }

    /// Keeps an engine running until `stop`, and ends it then.
    ///
    /// # Errors
    /// The first start fails: a wrong flag is not cured by trying again. Later ones are tried for ever. Of
    /// ranks that step together none can be started again alone, so the death of one is an error too. Nor is an
    /// engine started again whose adapters' files were replaced: the worker is known for those of before.
    pub(crate) async fn run(&self, stop: CancellationToken) -> Result<(), StartError> {
        let mut wait = BACK_OFF_FIRST;
        let mut first = true;
        loop {
            let started = tokio::select! {
                started = self.start(first) => started,
                // An engine whose start is dropped is ended.
                () = stop.cancelled() => return Ok(()),
            };
            match started {
                Ok((active, states)) => {
                    first = false;
                    let since = time::Instant::now();
                    self.put(Some(active.clone()));
                    let reason = tokio::select! {
                        reason = death(states) => reason,
                        () = stop.cancelled() => {
                            self.put(None);
                            active.engine.shutdown().await;
                            return Ok(());
                        }
                    };
                    self.put(None);
                    self.bury(&active, &reason);
                    if self.config.lockstep.is_some() {
                        return Err(StartError::Died(reason));
                    }
                    if since.elapsed() > WELL_AFTER {
                        wait = BACK_OFF_FIRST;
                    }
                }
                Err(error) if first || matches!(error, StartError::AdapterChanged { .. }) => {
                    return Err(error);
                }
                Err(error) => error!(rank = self.index, %error, "the engine did not start again"),
            }
            info!(
                rank = self.index,
                wait_s = wait.as_secs_f32(),
                "starting the engine again"
            );
            tokio::select! {
                () = time::sleep(wait) => {}
                () = stop.cancelled() => return Ok(()),
            }
            self.metrics.restarts.increment(1);
            wait = (wait * 2).min(BACK_OFF_MOST);
        }
    }

    async fn start(
        &self,
        first: bool,
    ) -> Result<(Arc<Active>, watch::Receiver<State>), StartError> {
        let requests = Arc::new(Requests::default());
        let sink = Sink {
            rank: self.index,
            plan: self.plan.clone(),
            requests: requests.clone(),
            loads: self.health.loads.clone(),
            metrics: self.metrics.clone(),
            engine_metrics: EngineMetrics::new(&self.model, self.index),
            batches: Vec::new(),
        };
        let (sender, mut states) = watch::channel(State::Starting(Phase::Preparing));
        let mut config = self.config.clone();
        if !first {
            config.waits.adopt = ADOPT_AGAIN;
        }
        let start = Engine::start_watched(config, sink, sender);
        tokio::pin!(start);
        let engine = loop {
            let state = states.borrow_and_update().clone();
            // It may have adapters to load; `put` says that it takes requests.
            if state != State::Ready {
                self.tell(state);
            }
            tokio::select! {
                biased;
                engine = &mut start => break engine?,
                Ok(()) = states.changed() => {}
            }
        };
        let states = engine.state();
        let active = Active {
            rank: self.index,
            engine,
            requests,
        };
        Ok((Arc::new(active), states))
    }

    fn put(&self, active: Option<Arc<Active>>) {
        if active.is_some() {
            self.tell(State::Ready);
        }
        *self.active.lock() = active;
        self.changed.send_modify(|count| *count += 1);
    }

    fn tell(&self, state: State) {
        self.health.engines.lock()[self.index as usize] = state;
    }

    /// Ends what ran in a dead engine. The engine client has failed its requests already; what is left
    /// was submitted in the moment of its death.
    fn bury(&self, active: &Active, reason: &DeadReason) {
        self.tell(State::Dead(reason.clone()));
        self.health.loads.clear(self.index);
        let left = active.requests.take_all();
        if !left.is_empty() {
            warn!(
                rank = self.index,
                requests = left.len(),
                "failing what the dead engine left"
            );
            self.metrics.failed(Code::EngineDead, left.len());
        }
        fail(left, Code::EngineDead, &reason.to_string());
    }
}

/// Ends requests with an error.
pub(crate) fn fail(requests: Vec<Running>, code: Code, message: &str) {
    for running in requests {
        let connection: &Connection = &running.connection;
        connection.fail(running.stream, code, message);
    }
}

async fn death(mut states: watch::Receiver<State>) -> DeadReason {
    loop {
        if let State::Dead(reason) = &*states.borrow_and_update() {
            return reason.clone();
        }
        if states.changed().await.is_err() {
            // The supervisor's last word is always Dead; without it nothing watches the engine.
            return DeadReason::Unreachable;
        }
    }
}
