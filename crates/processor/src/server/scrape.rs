//! `GET /metrics`: Prometheus's text format.
//!
//! What belongs to a worker process is written here from the live workers: a series ends with its worker.

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use stator_common::events::Medium;

use crate::App;
use crate::models::Model;
use crate::pool::{Availability, Target};

const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes all measurements.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut text = app.metrics.render();
    write_workers(&mut text, &app.models.list());
    let name = "peers_heard";
    head(
        &mut text,
        name,
        "gauge",
        "Other processors that say what they have booked",
    );
    sample(&mut text, name, &[], app.peers.load(Ordering::Relaxed));
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response()
}

/// Value of one target, if it has one now.
type Read = fn(&Target) -> Option<f64>;

const WORKER_SERIES: &[(&str, &str, &str, Read)] = &[
    (
        "worker_up",
        "gauge",
        "Whether the worker can take requests",
        |target| {
            Some(f64::from(u8::from(
                target.availability() == Availability::Open,
            )))
        },
    ),
    (
        "worker_decisions_total",
        "counter",
        "Requests that were sent to the worker",
        |target| {
            // Counted per process; shown once, on its first rank.
            (target.dp_rank.unwrap_or(0) == 0).then(|| target.worker.decisions() as f64)
        },
    ),
    (
        "worker_booked_requests",
        "gauge",
        "Unfinished requests",
        |target| Some(target.ledger.load().requests as f64),
    ),
    (
        "worker_booked_prefill_tokens",
        "gauge",
        "Prompt tokens not yet computed",
        |target| Some(target.ledger.load().prefill_tokens as f64),
    ),
    (
        "worker_booked_decode_tokens",
        "gauge",
        "Tokens of requests that generate",
        |target| Some(target.ledger.load().decode_tokens as f64),
    ),
    (
        "worker_reported_running",
        "gauge",
        "Requests that its engines run",
        |target| Some(f64::from(target.worker.reported().running)),
    ),
    (
        "worker_reported_waiting",
        "gauge",
        "Requests that wait in its engines",
        |target| Some(f64::from(target.worker.reported().waiting)),
    ),
    (
        "worker_reported_kv_usage",
        "gauge",
        "Share of KV blocks in use",
        |target| Some(f64::from(target.worker.reported().kv_usage)),
    ),
    (
        "worker_known_blocks",
        "gauge",
        "KV blocks that the worker is known or believed to hold on its device",
        |target| Some(target.entry()?.blocks(Medium::Gpu) as f64),
    ),
    (
        "worker_cache_missing_share",
        "gauge",
        "Share of what the worker had said it holds that its engine did not find lately",
        |target| Some(target.entry()?.drift()),
    ),
];

fn write_workers(text: &mut String, models: &[Arc<Model>]) {
    for (name, kind, help, read) in WORKER_SERIES {
        head(text, name, kind, help);
        for model in models {
            for target in model.fleet.targets().iter() {
                let Some(value) = read(target) else { continue };
                let rank = target
                    .dp_rank
                    .map(|rank| rank.to_string())
                    .unwrap_or_default();
                let labels = [
                    ("model", model.id.as_str()),
                    ("worker", target.worker.id().0.as_str()),
                    ("dp_rank", rank.as_str()),
                ];
                sample(text, name, &labels, value);
            }
        }
    }
    head(
        text,
        "prefill_queue_requests",
        "gauge",
        "Prompts that wait at the processor for a prefill worker with room",
    );
    for model in models {
        if let Some((requests, _)) = model.fleet.waiting() {
            let labels = [("model", model.id.as_str())];
            sample(text, "prefill_queue_requests", &labels, requests);
        }
    }
    head(
        text,
        "model_ready",
        "gauge",
        "Whether a worker can answer for the model",
    );
    for model in models {
        let value = u8::from(model.fleet.is_available());
        sample(text, "model_ready", &[("model", model.id.as_str())], value);
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP stator_processor_{name} {help}");
    let _ = writeln!(text, "# TYPE stator_processor_{name} {kind}");
}

fn sample(text: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    let _ = write!(text, "stator_processor_{name}{{");
    for (i, (label, content)) in labels.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let _ = write!(text, "{comma}{label}=\"{}\"", escape(content));
    }
    let _ = writeln!(text, "}} {value}");
}

fn escape(content: &str) -> String {
    content
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_cannot_break_out_of_its_quotes() {
        let mut text = String::new();
        sample(&mut text, "x", &[("a", "q\"\\\n"), ("b", "")], 2);
        assert_eq!(text, "stator_processor_x{a=\"q\\\"\\\\\\n\",b=\"\"} 2\n");
    }
}
