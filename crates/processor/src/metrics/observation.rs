//! What one request records, from its arrival to its end: handles are touched, nothing is looked up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use metrics::{Counter, Gauge, Histogram};

use super::{Endpoint, HandOffMetrics, Outcome, Totals};
use crate::knowledge::KnowledgeMetrics;

/// The handles of one model.
#[derive(Clone, Debug)]
pub struct ModelMetrics {
    pub(super) endpoints: [EndpointMetrics; Endpoint::ALL.len()],
    /// Attempts that were repeated on another worker.
    pub(crate) retries: Counter,
    pub(crate) handoff: HandOffMetrics,
    pub(crate) knowledge: KnowledgeMetrics,
    pub(super) totals: Arc<Totals>,
}

#[derive(Clone, Debug)]
pub(super) struct EndpointMetrics {
    pub(super) ended: [Counter; Outcome::ALL.len()],
    pub(super) inflight: Gauge,
    pub(super) ttft: Histogram,
    pub(super) itl: Histogram,
    pub(super) duration: Histogram,
    pub(super) prompt_tokens: Histogram,
    pub(super) output_tokens: Histogram,
    pub(super) output_total: Counter,
    pub(super) cached_total: Counter,
}

impl ModelMetrics {
    /// Begins to observe a request that arrived now.
    pub fn begin(&self, endpoint: Endpoint) -> Observation {
        let metrics = self.endpoints[endpoint as usize].clone();
        metrics.inflight.increment(1.0);
        self.totals.inflight.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        Observation {
            metrics,
            totals: Arc::clone(&self.totals),
            arrived: now,
            last: now,
            output: 0,
            outcome: Outcome::Cancelled,
        }
    }
}

/// One request, observed from its arrival to its drop.
///
/// Dropped without [`Observation::end`] it counts as cancelled: that is what happens when a client
/// goes away and its future is dropped.
#[derive(Debug)]
pub struct Observation {
    metrics: EndpointMetrics,
    totals: Arc<Totals>,
    arrived: Instant,
    last: Instant,
    output: u64,
    outcome: Outcome,
}

impl Observation {
    /// Records the length of the prompt; once per prompt.
    pub fn prompt(&self, tokens: usize) {
        self.metrics.prompt_tokens.record(tokens as f64);
    }

    /// Records how many of the prompt's tokens came from a cache.
    pub fn cached(&self, tokens: u32) {
        self.metrics.cached_total.increment(u64::from(tokens));
    }

    /// Records that `count` tokens came now; nothing if it is 0.
    ///
    /// With several choices in one request the interval is that between any two of its deltas.
    pub fn tokens(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let now = Instant::now();
        if self.output == 0 {
            self.metrics.ttft.record(now - self.arrived);
        } else {
            let each = (now - self.last).as_secs_f64() / count as f64;
            self.metrics.itl.record_many(each, count);
        }
        self.last = now;
        self.output += count as u64;
        self.metrics.output_total.increment(count as u64);
        self.totals
            .output_tokens
            .fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Says how the request ended; the last call counts, when the observation is dropped.
    pub fn end(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        self.metrics.inflight.decrement(1.0);
        self.totals.inflight.fetch_sub(1, Ordering::Relaxed);
        self.metrics.ended[self.outcome as usize].increment(1);
        if self.output > 0 {
            self.metrics.output_tokens.record(self.output as f64);
            self.metrics.duration.record(self.arrived.elapsed());
        }
    }
}
