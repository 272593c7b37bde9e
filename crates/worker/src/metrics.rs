//! What a worker counts.
//!
//! Names of our own begin with `stator_`. What the engine's scheduler says of itself bears vLLM's names and
//! labels (vLLM 0.32, `v1/metrics/loggers.py`), so that dashboards made for vLLM go on working.

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use stator_common::{
    Code,
    proto::worker::{self as proto, Delta, FinishReason, Leg, Load},
};
use stator_engine::SchedulerStats;

use crate::plan::Progress;

/// Counts requests and tokens of a worker. The handles are looked up once.
#[derive(Clone)]
pub(crate) struct WorkerMetrics {
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) first_token: Histogram,
    pub(crate) duration: Histogram,
    pub(crate) running: Gauge,
    pub(crate) connections: Gauge,
    pub(crate) restarts: Counter,
    /// Hand-offs that came when nobody wanted them any more.
    pub(crate) unwanted_handoffs: Counter,
    handoffs: Counter,
    failed_handoffs: Counter,
    recomputed_tokens: Counter,
}

impl WorkerMetrics {
    pub(crate) fn new() -> Self {
        describe_counter!(
            "stator_requests_total",
            "Requests that ended, by how: a finish reason, cancelled, or an error's code"
        );
        describe_counter!(
            "stator_prompt_tokens_total",
            "Prompt tokens of accepted requests"
        );
        describe_counter!(
            "stator_generated_tokens_total",
            "Tokens that the engines generated"
        );
        describe_counter!(
            "stator_cached_prompt_tokens_total",
            "Prompt tokens that came from a cache"
        );
        describe_histogram!(
            "stator_time_to_first_token_seconds",
            "From a request's arrival at the worker to its first output"
        );
        describe_histogram!(
            "stator_request_duration_seconds",
            "From a request's arrival at the worker to its end"
        );
        describe_gauge!(
            "stator_requests_running",
            "Requests in the engines of this worker"
        );
        describe_gauge!("stator_connections", "Connected processors");
        describe_counter!(
            "stator_engine_restarts_total",
            "Engines that died and were started again"
        );
        describe_counter!(
            "stator_legs_total",
            "Requests taken, by what of them is done here"
        );
        describe_counter!(
            "stator_handoffs_total",
            "Prompts whose KV was kept for another engine"
        );
        describe_counter!(
            "stator_handoffs_unwanted_total",
            "Of those, answered when the request had been given up"
        );
        describe_counter!(
            "stator_handoffs_failed_total",
            "Prompts whose KV another engine had and this one did not get, or that were not kept"
        );
        describe_counter!(
            "stator_handoff_recomputed_tokens_total",
            "Prompt tokens that this engine computed though another one had their KV"
        );
        Self {
            prompt_tokens: counter!("stator_prompt_tokens_total"),
            generated_tokens: counter!("stator_generated_tokens_total"),
            cached_tokens: counter!("stator_cached_prompt_tokens_total"),
            first_token: histogram!("stator_time_to_first_token_seconds"),
            duration: histogram!("stator_request_duration_seconds"),
            running: gauge!("stator_requests_running"),
            connections: gauge!("stator_connections"),
            restarts: counter!("stator_engine_restarts_total"),
            unwanted_handoffs: counter!("stator_handoffs_unwanted_total"),
            handoffs: counter!("stator_handoffs_total"),
            failed_handoffs: counter!("stator_handoffs_failed_total"),
            recomputed_tokens: counter!("stator_handoff_recomputed_tokens_total"),
        }
    }

    /// Counts a request that was taken.
    pub(crate) fn accepted(&self, leg: Leg) {
        counter!("stator_legs_total", "leg" => match leg {
            Leg::Unspecified => "whole",
            Leg::Prefill => "prefill",
            Leg::Decode => "decode",
            Leg::Local => "local",
            Leg::Release => "release",
        })
        .increment(1);
    }

    /// Counts what an output says of a hand-off.
    pub(crate) fn leg(&self, progress: &Progress, delta: &Delta) {
        if progress.leg == Leg::Prefill {
            if !delta.kv_transfer_params.is_empty() {
                self.handoffs.increment(1);
            } else if delta.finish() == FinishReason::Error {
                self.failed_handoffs.increment(1);
            }
        }
        if progress.leg == Leg::Decode {
            let recomputed = progress.recomputed(delta).unwrap_or_default();
            if recomputed > 0 {
                self.recomputed_tokens.increment(u64::from(recomputed));
            }
            let failed = delta.error.as_ref().map(|error| error.code());
            if failed == Some(proto::Code::HandoffFailed) {
                self.failed_handoffs.increment(1);
            }
        }
    }

    /// Counts a request that ended by itself.
    pub(crate) fn finished(&self, finish: FinishReason) {
        counter!("stator_requests_total", "outcome" => match finish {
            FinishReason::Unspecified => "unspecified",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Error => "error",
            FinishReason::Repetition => "repetition",
        })
        .increment(1);
    }

    /// Counts requests that their processor gave up.
    pub(crate) fn cancelled(&self, requests: usize) {
        counter!("stator_requests_total", "outcome" => "cancelled").increment(requests as u64);
    }

    /// Counts requests that were refused or broken off here.
    pub(crate) fn failed(&self, code: Code, requests: usize) {
        let outcome = format!("{code:?}").to_lowercase();
        counter!("stator_requests_total", "outcome" => outcome).increment(requests as u64);
    }
}

/// What the scheduler of one engine counts, under vLLM's names.
pub(crate) struct EngineMetrics {
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    transfers: Counter,
    transferred_bytes: Counter,
    transfer_microseconds: Counter,
}

fn labels(model: &str, rank: u32) -> [(&'static str, String); 2] {
    [
        ("model_name", model.to_owned()),
        ("engine", rank.to_string()),
    ]
}

impl EngineMetrics {
    pub(crate) fn new(model: &str, rank: u32) -> Self {
        let labels = labels(model, rank);
        Self {
            prefix_queries: counter!("vllm:prefix_cache_queries_total", &labels),
            prefix_hits: counter!("vllm:prefix_cache_hits_total", &labels),
            preemptions: counter!("vllm:num_preemptions_total", &labels),
            transfers: counter!("stator_kv_transfers_total", &labels),
            transferred_bytes: counter!("stator_kv_transfer_bytes_total", &labels),
            transfer_microseconds: counter!("stator_kv_transfer_microseconds_total", &labels),
        }
    }

    pub(crate) fn step(&self, stats: &SchedulerStats) {
        if stats.prefix_queries > 0 {
            self.prefix_queries.increment(stats.prefix_queries);
            self.prefix_hits.increment(stats.prefix_hits);
        }
        if stats.preempted > 0 {
            self.preemptions.increment(stats.preempted);
        }
        if stats.transfers > 0 {
            self.transfers.increment(stats.transfers);
            self.transferred_bytes.increment(stats.transferred_bytes);
            let microseconds = (stats.transfer_seconds * 1e6).round() as u64;
            self.transfer_microseconds.increment(microseconds);
        }
    }
}

/// Sets the gauges of the engines, under vLLM's names. Done when somebody asks, not in every step.
pub(crate) fn set_loads(model: &str, ranks: &[Load]) {
    for (rank, load) in (0..).zip(ranks) {
        let labels = labels(model, rank);
        gauge!("vllm:num_requests_running", &labels).set(load.running);
        gauge!("vllm:num_requests_waiting", &labels).set(load.waiting);
        gauge!("vllm:kv_cache_usage_perc", &labels).set(load.kv_usage);
    }
}
