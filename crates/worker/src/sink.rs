//! The way back: what one engine step brought, grouped by connection, one frame each.
//!
//! Runs in the engine's receive task, so between the engine's message and the processor's socket there is
//! no queue and no other task.

use std::sync::Arc;

use stator_common::{plane::Connection, proto::worker::Delta};
use stator_engine::{Output, Step, StepSink};
use tracing::{debug, trace};

use crate::{
    Plan, convert,
    metrics::{EngineMetrics, WorkerMetrics},
    requests::{Requests, Tables},
    status::Loads,
};

/// Sends the outputs of one engine to where its requests came from.
pub(crate) struct Sink {
    pub(crate) rank: u32,
    pub(crate) plan: Arc<dyn Plan>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) loads: Arc<Loads>,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) engine_metrics: EngineMetrics,
    /// One per connection that got something lately; their memory is used again in every step.
    pub(crate) batches: Vec<Batch>,
}

/// The deltas of one step for one connection.
pub(crate) struct Batch {
    connection: Arc<Connection>,
    deltas: Vec<Delta>,
}

impl StepSink for Sink {
    fn step(&mut self, step: Step) {
        trace!(rank = self.rank, outputs = step.outputs.len(), "step");
        // What ended is let go of outside the lock: dropping a request talks to the engine.
        let mut ended = Vec::new();
        let mut generated = 0;
        let requests = self.requests.clone();
        requests.with(|requests| {
            for output in step.outputs {
                let key = output.key;
                let Some(running) = requests.get(key) else {
                    self.late(requests, output);
                    continue;
                };
                generated += output.tokens.len() as u64;
                if let Some(cached) = output.cached_tokens {
                    self.metrics.cached_tokens.increment(u64::from(cached));
                }
                if !running.progress.started {
                    self.metrics.first_token.record(running.since.elapsed());
                }
                let last = output.finish.is_some();
                let mut delta = convert::delta(running.stream, output);
                self.plan.delta(&running.progress, &mut delta);
                self.metrics.leg(&running.progress, &delta);
                running.progress.started = true;
                if last {
                    self.metrics.finished(delta.finish());
                    self.metrics.duration.record(running.since.elapsed());
                }
                push(&mut self.batches, &running.connection, delta);
                if last {
                    ended.extend(requests.take(key));
                }
            }
        });
        self.metrics.generated_tokens.increment(generated);
        self.loads.generated(generated);
        if let Some(stats) = &step.stats {
            self.engine_metrics.step(stats);
            self.loads.set(self.rank, stats);
        }
        self.batches.retain_mut(|batch| {
            if !batch.deltas.is_empty() {
                batch.connection.send(&mut batch.deltas, None);
            }
            !batch.connection.is_closed()
        });
    }
}

impl Sink {
    /// Deals with an output of a request that was cancelled a moment ago: it is of no use, unless KV is held by
    /// it that somebody has to release.
    fn late(&mut self, requests: &mut Tables, output: Output) {
        if output.kv_transfer_params.is_none() {
            return;
        }
        let Some(late) = requests.take_late(output.key) else {
            return;
        };
        debug!(peer = %late.connection.peer(), "KV is held for a request that was given up");
        let mut delta = convert::delta(late.stream, output);
        self.plan.delta(&late.progress, &mut delta);
        self.metrics.leg(&late.progress, &delta);
        self.metrics.unwanted_handoffs.increment(1);
        push(&mut self.batches, &late.connection, delta);
    }
}

/// Adds a delta to its connection's batch. A worker has few processors, and neighbouring requests often the
/// same one, so looking through the batches is cheaper than a map.
fn push(batches: &mut Vec<Batch>, connection: &Arc<Connection>, delta: Delta) {
    let batch = batches
        .iter_mut()
        .find(|batch| batch.connection.id() == connection.id());
    match batch {
        Some(batch) => batch.deltas.push(delta),
        None => batches.push(Batch {
            connection: connection.clone(),
            deltas: vec![delta],
        }),
    }
}
