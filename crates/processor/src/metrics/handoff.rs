//! What is counted about hand-offs from prefill to decode workers.

use metrics::{Counter, Histogram, Recorder, Unit};

use super::{LATENCY_BUCKETS, Metrics};

pub(super) const PREFILL: &str = "stator_processor_prefill_leg_seconds";
pub(super) const WAITED: &str = "stator_processor_prefill_queue_seconds";
pub(super) const TRANSFER: &str = "stator_processor_decode_leg_start_seconds";
const HANDOFFS: &str = "stator_processor_handoffs_total";

/// Histograms of this file, with their bounds.
pub(super) const BUCKETS: [(&str, &[f64]); 3] = [
    (WAITED, LATENCY_BUCKETS),
    (PREFILL, LATENCY_BUCKETS),
    (TRANSFER, LATENCY_BUCKETS),
];

/// The handles of one model.
#[derive(Clone, Debug)]
pub struct HandOffMetrics {
    /// Decode legs that answered.
    pub(crate) done: Counter,
    /// Hand-offs that failed before their first token.
    pub(crate) failed: Counter,
    /// Prompts whose lease was over before a decode worker could be sent to fetch them.
    pub(crate) expired: Counter,
    /// Prompts that a decode worker computed itself, since a hand-off was not worth it.
    pub(crate) local: Counter,
    /// KV that was given back, since nobody wanted it any more.
    pub(crate) released: Counter,
    /// The same, but no decode worker was there to give it back.
    pub(crate) abandoned: Counter,
    /// From a prompt's arrival in the queue to a prefill worker with room.
    pub(crate) waited: Histogram,
    /// From sending a prompt to its KV being there.
    pub(crate) prefill: Histogram,
    /// From sending the decode leg to its first token.
    pub(crate) transfer: Histogram,
}

impl HandOffMetrics {
    pub(super) fn new(metrics: &Metrics, model: &str) -> Self {
        let count = |outcome| {
            let labels = [("model", model), ("outcome", outcome)];
            metrics.counter(HANDOFFS, &labels)
        };
        let time = |name| metrics.histogram(name, &[("model", model)]);
        Self {
            done: count("done"),
            failed: count("failed"),
            expired: count("expired"),
            local: count("local"),
            released: count("released"),
            abandoned: count("abandoned"),
            waited: time(WAITED),
            prefill: time(PREFILL),
            transfer: time(TRANSFER),
        }
    }
}

/// Says what the series mean.
pub(super) fn describe(metrics: &Metrics) {
    let recorder = &metrics.recorder;
    let counted = "Hand-offs from prefill to decode: done; failed or expired (tried again); local (not worth one); \
                   released or abandoned (given back, or left to its lease)";
    recorder.describe_counter(HANDOFFS.into(), None, counted.into());
    let seconds = Some(Unit::Seconds);
    let waited = "Time that prompts waited at the processor for a prefill worker with room";
    recorder.describe_histogram(WAITED.into(), seconds, waited.into());
    let prefill = "Sending a prompt to a prefill worker, to its KV being there";
    recorder.describe_histogram(PREFILL.into(), seconds, prefill.into());
    let transfer = "Sending a prompt's KV parameters to a decode worker, to the first token";
    recorder.describe_histogram(TRANSFER.into(), seconds, transfer.into());
}
