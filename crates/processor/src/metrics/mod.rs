//! What the processor counts, and how little that costs.
//!
//! Every series is registered once, when its model (or the process) begins; a request then touches
//! handles only. Nothing here is global: two processors in one test count apart. Series whose
//! labels come and go with worker processes are not kept here but written from the live workers at the
//! time of asking (`server::scrape`), so that memory does not grow with their history.

mod handoff;
mod labels;
mod observation;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::knowledge::KnowledgeMetrics;
pub use handoff::HandOffMetrics;
pub use labels::{Endpoint, Outcome};
use observation::EndpointMetrics;
pub use observation::{ModelMetrics, Observation};

/// Upper bounds in seconds: 1 ms to 480 s, for times until something.
const LATENCY_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 240.0, 480.0,
];
/// Upper bounds in seconds: 0.5 ms to 10 s, for the time between two tokens.
const INTERVAL_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
];
/// Upper bounds in tokens: 1 to 262144.
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0,
];
/// How often recorded values are folded into their buckets, which bounds the memory between two scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

const TTFT: &str = "stator_processor_time_to_first_token_seconds";
const ITL: &str = "stator_processor_inter_token_latency_seconds";
const DURATION: &str = "stator_processor_request_duration_seconds";
const PROMPT_TOKENS: &str = "stator_processor_prompt_tokens";
const OUTPUT_TOKENS: &str = "stator_processor_output_tokens";
const EXPECTED: &str = "stator_processor_cache_expected_tokens_total";
const MISSING: &str = "stator_processor_cache_missing_tokens_total";
const RESYNCS: &str = "stator_processor_cache_resyncs_total";

/// The process's measurements.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    totals: Arc<Totals>,
}

/// Sums over all models, for those who want one number and no text format.
#[derive(Debug, Default)]
pub struct Totals {
    /// Generating requests that run now.
    pub inflight: AtomicU64,
    /// Tokens generated since the process began.
    pub output_tokens: AtomicU64,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Returns measurements that start at zero.
    pub fn new() -> Self {
        let buckets = [
            (TTFT, LATENCY_BUCKETS),
            (ITL, INTERVAL_BUCKETS),
            (DURATION, LATENCY_BUCKETS),
            (PROMPT_TOKENS, TOKEN_BUCKETS),
            (OUTPUT_TOKENS, TOKEN_BUCKETS),
        ];
        let recorder = buckets
            .into_iter()
            .chain(handoff::BUCKETS)
            .try_fold(PrometheusBuilder::new(), |builder, (name, bounds)| {
                builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), bounds)
            })
            .expect("no list of buckets is empty")
            .build_recorder();
        let handle = recorder.handle();
        let totals = Arc::default();
        let metrics = Self {
            recorder,
            handle,
            totals,
        };
        metrics.describe();
        metrics
    }

    fn describe(&self) {
        let r = &self.recorder;
        let text = |s: &'static str| s.into();
        let requests = text("HTTP requests answered, by route and status");
        r.describe_counter(
            "stator_processor_http_requests_total".into(),
            None,
            requests,
        );
        let ended = text("Generating requests, by how they ended");
        r.describe_counter("stator_processor_requests_total".into(), None, ended);
        let inflight = text("Generating requests that run now");
        r.describe_gauge("stator_processor_inflight_requests".into(), None, inflight);
        let retries = text("Attempts that failed before a token came and were repeated elsewhere");
        r.describe_counter("stator_processor_retries_total".into(), None, retries);
        let refused = text("Workers refused since they disagree with those that serve the model");
        r.describe_counter(
            "stator_processor_workers_refused_total".into(),
            None,
            refused,
        );
        let output = text("Tokens generated");
        r.describe_counter(
            "stator_processor_generated_tokens_total".into(),
            None,
            output,
        );
        let cached = text("Prompt tokens that came from a cache");
        r.describe_counter("stator_processor_cached_tokens_total".into(), None, cached);
        let expected =
            text("Prompt tokens that workers had said they hold when they were sent there");
        r.describe_counter(EXPECTED.into(), None, expected);
        let missing = text("Of the expected, prompt tokens that the engines did not find");
        r.describe_counter(MISSING.into(), None, missing);
        let resyncs = text("Views of caches asked for again, since too much was missing");
        r.describe_counter(RESYNCS.into(), None, resyncs);
        let seconds = Some(Unit::Seconds);
        r.describe_histogram(TTFT.into(), seconds, text("Arrival to first token"));
        r.describe_histogram(
            ITL.into(),
            seconds,
            text("Time between two tokens of a stream"),
        );
        r.describe_histogram(
            DURATION.into(),
            seconds,
            text("Arrival to the end of the answer"),
        );
        r.describe_histogram(PROMPT_TOKENS.into(), None, text("Tokens per prompt"));
        r.describe_histogram(OUTPUT_TOKENS.into(), None, text("Tokens per answer"));
        handoff::describe(self);
    }

    /// Writes everything in Prometheus's text format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds recorded values into their buckets, for ever.
    pub async fn upkeep(&self) {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            self.handle.run_upkeep();
        }
    }

    /// Returns the sums over all models.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Returns the counter of workers that were refused.
    pub fn workers_refused(&self) -> Counter {
        self.counter("stator_processor_workers_refused_total", &[])
    }

    /// Returns the counter of HTTP answers with this route pattern and status.
    pub(crate) fn http_requests(&self, route: &str, status: u16) -> Counter {
        let labels = [("route", route), ("status", &status.to_string())];
        self.counter("stator_processor_http_requests_total", &labels)
    }

    /// Returns the handles of a model, registering them on first use.
    pub fn model(&self, model: &str) -> ModelMetrics {
        ModelMetrics {
            endpoints: Endpoint::ALL.map(|endpoint| {
                let labels = [("model", model), ("endpoint", endpoint.label())];
                EndpointMetrics {
                    ended: Outcome::ALL.map(|outcome| {
                        let labels = [labels[0], labels[1], ("outcome", outcome.label())];
                        self.counter("stator_processor_requests_total", &labels)
                    }),
                    inflight: self.gauge("stator_processor_inflight_requests", &labels),
                    ttft: self.histogram(TTFT, &labels),
                    itl: self.histogram(ITL, &labels),
                    duration: self.histogram(DURATION, &labels),
                    prompt_tokens: self.histogram(PROMPT_TOKENS, &labels),
                    output_tokens: self.histogram(OUTPUT_TOKENS, &labels),
                    output_total: self.counter("stator_processor_generated_tokens_total", &labels),
                    cached_total: self.counter("stator_processor_cached_tokens_total", &labels),
                }
            }),
            retries: self.counter("stator_processor_retries_total", &[("model", model)]),
            handoff: HandOffMetrics::new(self, model),
            knowledge: KnowledgeMetrics {
                expected: self.counter(EXPECTED, &[("model", model)]),
                missing: self.counter(MISSING, &[("model", model)]),
                resyncs: self.counter(RESYNCS, &[("model", model)]),
            },
            totals: Arc::clone(&self.totals),
        }
    }

    fn counter(&self, name: &'static str, labels: &[(&str, &str)]) -> Counter {
        self.recorder
            .register_counter(&key(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[(&str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    fn histogram(&self, name: &'static str, labels: &[(&str, &str)]) -> Histogram {
        self.recorder
            .register_histogram(&key(name, labels), &METADATA)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

static METADATA: Metadata<'static> =
    Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

fn key(name: &'static str, labels: &[(&str, &str)]) -> Key {
    let labels: Vec<Label> = labels
        .iter()
        .map(|(name, value)| Label::new((*name).to_owned(), (*value).to_owned()))
        .collect();
    Key::from_parts(name, labels)
}

#[cfg(test)]
mod tests {
    use stator_common::Code;

    use super::*;

    #[test]
    fn a_request_is_counted_under_its_model_endpoint_and_outcome() {
        let metrics = Metrics::new();
        let model = metrics.model("m");
        let mut done = model.begin(Endpoint::Chat);
        done.prompt(12);
        done.tokens(1);
        done.tokens(3);
        done.end(Outcome::Success);
        let gone = model.begin(Endpoint::Completions);
        drop(gone);
        let text = metrics.render();
        assert!(text.contains(
            "stator_processor_inflight_requests{model=\"m\",endpoint=\"chat_completions\"} 1"
        ));
        drop(done);
        let text = metrics.render();
        for line in [
            "requests_total{model=\"m\",endpoint=\"chat_completions\",outcome=\"success\"} 1",
            "requests_total{model=\"m\",endpoint=\"completions\",outcome=\"cancelled\"} 1",
            "inflight_requests{model=\"m\",endpoint=\"chat_completions\"} 0",
            "generated_tokens_total{model=\"m\",endpoint=\"chat_completions\"} 4",
            "time_to_first_token_seconds_count{model=\"m\",endpoint=\"chat_completions\"} 1",
            "inter_token_latency_seconds_count{model=\"m\",endpoint=\"chat_completions\"} 3",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn every_code_has_an_outcome_other_than_success() {
        for code in [
            Code::InvalidRequest,
            Code::Overloaded,
            Code::Draining,
            Code::Internal,
        ] {
            assert_ne!(Outcome::from(code), Outcome::Success);
        }
    }
}
