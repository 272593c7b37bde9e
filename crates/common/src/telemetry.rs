//! What is going on in a process: logs to stderr, metrics for whoever asks.
//!
//! `STATOR_LOG` (else `RUST_LOG`, else `info`) filters, `STATOR_LOG_FORMAT=json` makes one JSON object per
//! line. Secrets do not come here: tokens and keys are not in any log statement.

use std::{convert::Infallible, env, fmt, io::IsTerminal, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Seconds; from a fast engine step to a long answer.
const LATENCY_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// What is logged unless told otherwise. The libraries of ZMQ and NATS tell of every connection that ends, and that of
/// Kubernetes of every try that fails, which we do where it matters.
const DEFAULT_FILTER: &str = "info,zeromq=warn,async_nats=warn,kube_client=off,kube_runtime=off";

/// How often recorded values are folded into their buckets, which bounds the memory between two scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Why telemetry did not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{name}='{value}' is not a log filter: {reason}")]
    Filter {
        name: &'static str,
        value: String,
        reason: String,
    },
    #[error("STATOR_LOG_FORMAT='{0}' is neither text nor json")]
    Format(String),
    #[error("telemetry was started before: {0}")]
    Twice(String),
}

/// Running telemetry; renders the process's metrics.
#[derive(Clone)]
pub struct Telemetry {
    metrics: PrometheusHandle,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Telemetry")
    }
}

/// Starts logs and metrics of a process. Call once, before anything else says something.
///
/// A process that records values runs [`Telemetry::upkeep`] too.
///
/// # Errors
/// A filter or format that cannot be understood; a second start.
pub fn init(role: &'static str) -> Result<Telemetry, TelemetryError> {
    init_logs()?;
    let metrics = PrometheusBuilder::new()
        .add_global_label("role", role)
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), LATENCY_BUCKETS)
        .expect("the buckets are not empty")
        .install_recorder()
        .map_err(|error| TelemetryError::Twice(error.to_string()))?;
    Ok(Telemetry { metrics })
}

/// Starts logs only, for commands that serve nothing.
///
/// # Errors
/// A filter or format that cannot be understood; a second start.
pub fn init_logs() -> Result<(), TelemetryError> {
    let (name, value) = ["STATOR_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| Some((name, env::var(name).ok()?)))
        .unwrap_or(("STATOR_LOG", DEFAULT_FILTER.to_owned()));
    let filter = EnvFilter::try_new(&value).map_err(|error| TelemetryError::Filter {
        name,
        value,
        reason: error.to_string(),
    })?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match env::var("STATOR_LOG_FORMAT").as_deref() {
        Ok("json") => registry.with(layer.json()).try_init(),
        Ok("text") | Err(_) => registry
            .with(
                layer
                    .compact()
                    .with_target(false)
                    .with_ansi(std::io::stderr().is_terminal()),
            )
            .try_init(),
        Ok(other) => return Err(TelemetryError::Format(other.to_owned())),
    }
    .map_err(|error| TelemetryError::Twice(error.to_string()))
}

impl Telemetry {
    /// Returns telemetry that hears nothing: for tests, of which several share a process.
    pub fn detached() -> Self {
        Self {
            metrics: PrometheusBuilder::new().build_recorder().handle(),
        }
    }

    /// Folds recorded values into their buckets, for ever. Without it every value of a histogram stays in
    /// memory until somebody asks for the metrics, which may be never.
    pub async fn upkeep(&self) -> Infallible {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            self.metrics.run_upkeep();
        }
    }

    /// Returns all metrics in Prometheus' text format.
    pub fn render(&self) -> String {
        self.metrics.render()
    }
}
