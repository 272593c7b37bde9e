//! What a worker does with what arrives on the request plane.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use stator_common::{
    BlobHash, Code,
    plane::tcp::{Connection, Handler},
    proto::worker::{Error, GenerateRequest},
};
use tokio::{sync::watch, time};
use tracing::debug;

use crate::{
    convert,
    files::Files,
    metrics::WorkerMetrics,
    rank::{Active, Rank},
    requests::{Count, Counted},
    status::Health,
};

/// How often processors learn of a changed load, at most. The plane's protocol says so.
const LOAD_EVERY: Duration = Duration::from_millis(100);

/// Takes requests for the engines of a worker.
pub(crate) struct Serving {
    pub(crate) ranks: Vec<Arc<Rank>>,
    pub(crate) health: Arc<Health>,
    pub(crate) count: Arc<Count>,
    pub(crate) metrics: WorkerMetrics,
    /// Empty until the first engine is ready.
    pub(crate) files: Mutex<Arc<Files>>,
    pub(crate) connections: Mutex<Vec<Arc<Connection>>>,
    pub(crate) changed: watch::Receiver<u64>,
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
        if let Err(error) = self.try_submit(connection, stream, request, counted) {
            debug!(peer = %connection.peer(), code = ?error.code(), message = error.message, "refused");
            self.metrics.failed(error.code().into(), 1);
            connection.send(&mut vec![convert::failed(stream, error)], None);
        }
    }

    fn cancel(&self, connection: &Arc<Connection>, stream: u32) {
        for active in self.active() {
            if let Some(cancelled) = active.requests.take_stream(connection, stream) {
                drop(cancelled);
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
                drop(left);
                self.lightened(&active);
            }
        }
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
        request: GenerateRequest,
        counted: Counted,
    ) -> Result<(), Error> {
        if self.health.draining.load(Ordering::Acquire) {
            return Err(convert::error(Code::Draining, "the worker is draining", ""));
        }
        let active = self.choose(request.dp_rank)?;
        let deadline = request.deadline_ms.map(Duration::from_millis);
        let prompt_tokens = request.prompt_tokens.len() as u64 / 4;
        let request = convert::request(request).map_err(|malformed| malformed.to_error())?;
        let prepared = active
            .engine
            .prepare(request)
            .map_err(|refused| convert::refusal(&refused))?;
        let (metrics, loads) = (self.metrics.clone(), self.health.loads.clone());
        let (rank, requests) = (active.rank, Arc::downgrade(&active.requests));
        active
            .requests
            .start(
                prepared,
                counted,
                (connection, stream),
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
                    drop(running);
                    loads.cap(rank, requests.upgrade().map_or(0, |all| all.len()));
                },
            )
            .map_err(|refused| convert::refusal(&refused))?;
        self.metrics.prompt_tokens.increment(prompt_tokens);
        Ok(())
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
