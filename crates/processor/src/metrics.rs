//! What the processor counts, and how little that costs.
//!
//! Every series is registered once, when its model (or the process) begins; a request then touches
//! handles only. Nothing here is global: two processors in one test count apart. Series whose
//! labels come and go with worker processes are not kept here but written from the live workers at the
//! time of asking (`server::scrape`), so that memory does not grow with their history.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use stator_common::Code;

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

/// The generating routes, as labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
}

impl Endpoint {
    const ALL: [Self; 2] = [Self::Chat, Self::Completions];

    fn label(self) -> &'static str {
        match self {
            Self::Chat => "chat_completions",
            Self::Completions => "completions",
        }
    }
}

/// How a generating request ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a complete answer.
    Success,
    /// The request was at fault.
    Refused,
    /// There was no room for it.
    Overloaded,
    /// Nobody was there to serve it.
    Unavailable,
    /// The client went away.
    Cancelled,
    /// It took too long.
    Expired,
    /// A defect.
    Failed,
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Success,
        Self::Refused,
        Self::Overloaded,
        Self::Unavailable,
        Self::Cancelled,
        Self::Expired,
        Self::Failed,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Failed => "failed",
        }
    }
}

impl From<Code> for Outcome {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidRequest | Code::NotFound | Code::TooLarge | Code::Unauthenticated => {
                Self::Refused
            }
            Code::Overloaded => Self::Overloaded,
            Code::Unavailable | Code::Draining | Code::EngineDead | Code::Disconnected => {
                Self::Unavailable
            }
            Code::Cancelled => Self::Cancelled,
            Code::DeadlineExceeded => Self::Expired,
            Code::Incompatible | Code::Internal => Self::Failed,
        }
    }
}

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

/// The handles of one model.
#[derive(Debug)]
pub struct ModelMetrics {
    endpoints: [EndpointMetrics; Endpoint::ALL.len()],
    /// Attempts that were repeated on another worker.
    pub(crate) retries: Counter,
    totals: Arc<Totals>,
}

#[derive(Clone, Debug)]
struct EndpointMetrics {
    ended: [Counter; Outcome::ALL.len()],
    inflight: Gauge,
    ttft: Histogram,
    itl: Histogram,
    duration: Histogram,
    prompt_tokens: Histogram,
    output_tokens: Histogram,
    output_total: Counter,
    cached_total: Counter,
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

#[cfg(test)]
mod tests {
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
