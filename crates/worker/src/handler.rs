//! What a worker does with what arrives on the request plane.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use stator_common::{
    BlobHash, Code,
    plane::{Connection, Handler},
    proto::worker::{Delta, Error, FinishReason, GenerateRequest, Leg, Sampling},
};
use stator_engine::{Engine, Lora, Prepared, RequestKey, SubmitError};
use tokio::{sync::watch, time};
use tracing::{debug, warn};

use crate::{
    Plan,
    adapters::Adapter,
    convert,
    files::Files,
    line::Promises,
    metrics::WorkerMetrics,
    rank::{Active, Rank},
    requests::{Count, Counted, Running, Tables},
    status::Health,
};

/// How often processors learn of a changed load, at most. The plane's protocol says so.
const LOAD_EVERY: Duration = Duration::from_millis(100);

/// The pauses after which an engine is told again to give KV back, or is woken after a fetch was given up. Of an
/// engine that it has not spoken to before, the first word is only a greeting, and the rest waits for its next
/// step, which an idle engine does not take (NixlConnector, 0.32). To say it once more does no harm.
const RELEASE_AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(2500)];

/// Takes requests for the engines of a worker.
pub(crate) struct Serving {
    pub(crate) ranks: Vec<Arc<Rank>>,
    pub(crate) plan: Arc<dyn Plan>,
    pub(crate) adapters: Arc<[Adapter]>,
    pub(crate) health: Arc<Health>,
    pub(crate) count: Arc<Count>,
    pub(crate) metrics: WorkerMetrics,
    /// Empty until the first engine is ready.
    pub(crate) files: Mutex<Arc<Files>>,
    pub(crate) connections: Mutex<Vec<Arc<Connection>>>,
    pub(crate) changed: watch::Receiver<u64>,
    /// Prompts that are on their way.
    pub(crate) promises: Promises,
}

impl Handler for Serving {
    fn opened(&self, connection: &Arc<Connection>) {
        self.metrics.connections.increment(1);
        self.connections.lock().push(connection.clone());
        connection.send_load(self.health.loads.total());
    }

    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        // Counted before looking whether the worker drains, so that a drain misses none.
        let counted = self.count.enter();
        if let Err(mut error) = self.try_submit(connection, stream, request, counted) {
            error.untouched = true;
            debug!(peer = %connection.peer(), code = ?error.code(), message = error.message, "refused");
            self.metrics.failed(error.code().into(), 1);
            connection.send(&mut vec![convert::failed(stream, error)], None);
        }
    }

    fn cancel(&self, connection: &Arc<Connection>, stream: u32) {
        for active in self.active() {
            if let Some(cancelled) = active.requests.take_stream(connection, stream) {
                abandon(&*self.plan, &active, cancelled);
                self.metrics.cancelled(1);
                self.lightened(&active);
                return;
            }
        }
    }

    fn closed(&self, connection: &Arc<Connection>) {
        self.metrics.connections.decrement(1);
        self.connections
            .lock()
            .retain(|other| other.id() != connection.id());
        for active in self.active() {
            let left = active.requests.take_connection(connection);
            if !left.is_empty() {
                self.metrics.cancelled(left.len());
                let unfetched = left.iter().any(|running| running.progress.is_unfetched());
                drop(left);
                if unfetched {
                    remind(&active.engine, nothing());
                }
                self.lightened(&active);
            }
        }
    }

    fn is_ready(&self) -> bool {
        self.active().next().is_some()
    }

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        self.files.lock().get(hash)
    }
}

impl Serving {
    /// Returns the engines that run.
    pub(crate) fn active(&self) -> impl Iterator<Item = Arc<Active>> {
        self.ranks.iter().filter_map(|rank| rank.active())
    }

    /// Takes what was just given up off an engine's load.
    fn lightened(&self, active: &Active) {
        let left = active.requests.len();
        self.health.loads.cap(active.rank, left);
    }

    fn try_submit(
        &self,
        connection: &Arc<Connection>,
        stream: u32,
        mut request: GenerateRequest,
        counted: Counted,
    ) -> Result<(), Error> {
        if self.health.draining.load(Ordering::Acquire) {
            return Err(convert::error(Code::Draining, "the worker is draining", ""));
        }
        // A frame is shorter than 4 GiB.
        let prompt_tokens = (request.prompt_tokens.len() / 4) as u32;
        let work = self
            .promises
            .came(&request.request_id, prompt_tokens.into());
        let leg = self.plan.request(&mut request)?;
        if !request.transfer_id.is_empty() {
            // Connectors that push find the two sides of a hand-off by it.
            request.request_id = std::mem::take(&mut request.transfer_id);
        }
        let active = self.choose(request.dp_rank)?;
        if leg == Leg::Release {
            return self.release(&active, connection, stream, request);
        }
        let deadline = request.deadline_ms.map(Duration::from_millis);
        let lease = request.kv_lease_ms.map(Duration::from_millis);
        let lora = self.lora(&request.lora)?;
        let request = convert::request(request, lora).map_err(|malformed| malformed.to_error())?;
        let prepared = active
            .engine
            .prepare(request)
            .map_err(|refused| convert::refusal(&refused))?;
        let key = prepared.key();
        let (metrics, loads) = (self.metrics.clone(), self.health.loads.clone());
        let (plan, own) = (self.plan.clone(), Arc::downgrade(&active));
        active
            .requests
            .start(
                prepared,
                counted,
                (connection, stream),
                (leg, prompt_tokens, work),
                deadline,
                move |running| {
                    metrics.failed(Code::DeadlineExceeded, 1);
                    let message = format!(
                        "not finished within {} ms",
                        running.since.elapsed().as_millis()
                    );
                    running
                        .connection
                        .fail(running.stream, Code::DeadlineExceeded, message);
                    // Without its engine it was ended already.
                    if let Some(active) = own.upgrade() {
                        abandon(&*plan, &active, running);
                        loads.cap(active.rank, active.requests.len());
                    }
                },
            )
            .map_err(|refused| convert::refusal(&refused))?;
        if let Some(lease) = lease {
            self.guard(&active, key, lease);
        }
        self.metrics.accepted(leg);
        self.metrics
            .prompt_tokens
            .increment(u64::from(prompt_tokens));
        Ok(())
    }

    /// Gives a request up whose KV may be gone before the engine has taken it in hand.
    ///
    /// From then on its scheduler keeps the lease alive; before, only time counts, and an engine can be deaf for
    /// longer than a lease (it compiles, its device hangs). What it would fetch then is another prompt's KV.
    fn guard(&self, active: &Arc<Active>, key: RequestKey, lease: Duration) {
        let (active, metrics, loads) = (
            active.clone(),
            self.metrics.clone(),
            self.health.loads.clone(),
        );
        let until = time::Instant::now() + lease;
        let (requests, plan) = (active.requests.clone(), self.plan.clone());
        let guard = tokio::spawn(async move {
            time::sleep_until(until - lease / 3).await;
            let is_unfetched = |running: &mut Running| running.progress.is_unfetched();
            let waits = |tables: &mut Tables| tables.get(key).is_some_and(is_unfetched);
            if !active.requests.with(waits) {
                return;
            }
            // It answers in the order in which it is asked: an answer means that it has the request.
            let asked = active.engine.utility("is_sleeping", &[]);
            if time::timeout_at(until, asked).await.is_ok() {
                return;
            }
            let unfetched = |tables: &mut Tables| waits(tables).then(|| tables.take(key)).flatten();
            let Some(running) = active.requests.with(unfetched) else {
                return;
            };
            warn!(
                rank = active.rank,
                "the engine did not take a hand-off before its KV may be gone"
            );
            metrics.failed(Code::HandoffFailed, 1);
            let message = "the decode engine did not take the request while its KV was kept";
            running
                .connection
                .fail(running.stream, Code::HandoffFailed, message);
            abandon(&*plan, &active, running);
            loads.cap(active.rank, active.requests.len());
        });
        requests.guard(key, guard.abort_handle());
    }

    /// Has the engine tell another one that nobody will fetch what it keeps. The engine says nothing to
    /// that, so this does.
    fn release(
        &self,
        active: &Active,
        connection: &Connection,
        stream: u32,
        mut request: GenerateRequest,
    ) -> Result<(), Error> {
        if request.prompt_tokens.is_empty() {
            request.prompt_tokens = Bytes::from_static(&[0; 4]);
        }
        let first = tell(&active.engine, request.clone())?;
        first.map_err(|refused| convert::refusal(&refused))?;
        remind(&active.engine, request);
        self.metrics.accepted(Leg::Release);
        self.metrics.finished(FinishReason::Abort);
        let released = Delta {
            stream,
            finish: FinishReason::Abort.into(),
            ..Delta::default()
        };
        connection.send(&mut vec![released], None);
        Ok(())
    }

    /// Returns the adapter of a name, as the engines know it. Absent: the model itself.
    fn lora(&self, name: &str) -> Result<Option<Lora>, Error> {
        if name.is_empty() {
            return Ok(None);
        }
        let mut loras = self.adapters.iter().map(|one| &one.loaded.lora);
        let lora = loras.find(|lora| lora.name == name);
        lora.cloned().map(Some).ok_or_else(|| {
            // Whoever sent it knows the worker of before, perhaps; another one may have the adapter.
            let message = format!("this worker does not serve the LoRA adapter '{name}'");
            convert::error(Code::Unavailable, message, "model")
        })
    }

    /// Returns the engine of a rank, or else the one with the fewest requests.
    fn choose(&self, rank: Option<u32>) -> Result<Arc<Active>, Error> {
        let chosen = match rank {
            Some(index) => {
                let rank = self.ranks.get(index as usize).ok_or_else(|| {
                    let message = format!("there is no rank {index} of {}", self.ranks.len());
                    convert::error(Code::InvalidRequest, message, "dp_rank")
                })?;
                rank.active()
            }
            None if self.ranks.len() == 1 => self.ranks[0].active(),
            None => self.active().min_by_key(|active| active.requests.len()),
        };
        chosen.ok_or_else(|| convert::error(Code::Unavailable, "the engine is not ready", ""))
    }

    /// Tells all processors when the load has changed. Runs until it is dropped.
    pub(crate) async fn publish_load(&self) {
        loop {
            self.health.loads.changed().await;
            let load = self.health.loads.total();
            let connections = self.connections.lock().clone();
            for connection in connections {
                connection.send_load(load);
            }
            time::sleep(LOAD_EVERY).await;
        }
    }
}

/// Aborts a request in the engine, before its answer is complete, and sees to the KV that somebody keeps for it.
fn abandon(plan: &dyn Plan, active: &Active, running: Running) {
    if plan.outlives_cancel() {
        active.requests.give_up(running);
        return;
    }
    let unfetched = running.progress.is_unfetched();
    drop(running);
    if unfetched {
        remind(&active.engine, nothing());
    }
}

/// Gives an engine a request that ends before it begins: of it only what its connector hears counts.
fn tell(engine: &Engine, mut request: GenerateRequest) -> Result<Result<(), SubmitError>, Error> {
    request.sampling = Some(Sampling {
        max_tokens: 1,
        ..Sampling::default()
    });
    let mut request = convert::request(request, None).map_err(|malformed| malformed.to_error())?;
    request.abort_immediately = true;
    let prepared = engine.prepare(request);
    Ok(prepared.and_then(Prepared::send_unattended))
}

/// Tells an engine the same once more, a little later.
fn remind(engine: &Engine, request: GenerateRequest) {
    let engine = engine.clone();
    tokio::spawn(async move {
        for pause in RELEASE_AGAIN {
            time::sleep(pause).await;
            match tell(&engine, request.clone()) {
                Ok(Ok(())) => {}
                Ok(Err(SubmitError::Dead)) => return,
                refused => {
                    warn!(?refused, "the engine is not told to give KV back");
                    return;
                }
            }
        }
    });
}

/// A request that makes an engine take a step, and nothing else.
fn nothing() -> GenerateRequest {
    GenerateRequest {
        request_id: "nothing".to_owned(),
        prompt_tokens: Bytes::from_static(&[0; 4]),
        ..GenerateRequest::default()
    }
}
