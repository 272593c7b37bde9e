//! `GET /workers`: what the router believes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use stator_common::events::Medium;
use stator_common::plane;
use stator_router::Load;

use crate::App;
use crate::knowledge::Entry;
use crate::models::Model;
use crate::pool::{Availability, Target};

/// Shows every target with its state and load, and the workers that get no requests.
pub(super) async fn workers(State(app): State<Arc<App>>) -> Json<Value> {
    let unused = app.models.unused().into_iter().map(|unused| {
        json!({
            "worker": unused.worker,
            "model": unused.model,
            "reason": unused.reason,
            "passing": unused.passing,
        })
    });
    Json(json!({
        "router_mode": app.config.router_mode,
        "processors_heard": app.peers.load(Ordering::Relaxed),
        "models": app.models.list().iter().map(|model| entry(model)).collect::<Vec<_>>(),
        "unused": unused.collect::<Vec<_>>(),
    }))
}

fn entry(model: &Model) -> Value {
    let targets = model.fleet.targets();
    json!({
        "model": model.id,
        "names": model.card.names,
        "prefill_queue": model.fleet.waiting().map(|(requests, tokens)| json!({
            "requests": requests,
            "tokens": tokens,
            "shared": model.fleet.is_shared(),
        })),
        "targets": targets.iter().map(|target| describe(target)).collect::<Vec<_>>(),
    })
}

fn describe(target: &Target) -> Value {
    let worker = &target.worker;
    let card = worker.card();
    let load = |load: Load| {
        json!({
            "requests": load.requests,
            "prompts": load.prompts,
            "prefill_tokens": load.prefill_tokens,
            "decode_tokens": load.decode_tokens,
        })
    };
    let reported = worker.reported();
    json!({
        "worker": worker.id(),
        "dp_rank": target.dp_rank,
        "endpoint": card.endpoint.to_string(),
        "address": card.address,
        "role": card.role,
        "adapters": card.adapters.iter().map(|adapter| &adapter.name).collect::<Vec<_>>(),
        "vllm_version": card.model.vllm_version,
        "kv_blocks": card.model.kv_blocks,
        "block_size": card.model.block_size,
        "max_num_seqs": card.model.max_num_seqs,
        "connection": connection(worker.state()),
        "availability": match target.availability() {
            Availability::Open => "open",
            Availability::Inhibited => "inhibited",
            Availability::Absent => "absent",
        },
        "decisions": worker.decisions(),
        "booked": load(target.ledger.load()),
        "booked_by_others": load(target.elsewhere.load()),
        "reported": {
            "running": reported.running,
            "waiting": reported.waiting,
            "kv_usage": reported.kv_usage,
        },
        "cache": target.entry().map(cache),
    })
}

/// Shows what is known of a target's cache, where routing looks at that.
fn cache(entry: &Entry) -> Value {
    json!({
        "known_from": if entry.tells() { "events" } else { "routing" },
        "device_blocks": entry.blocks(Medium::Gpu),
        "host_blocks": entry.blocks(Medium::Cpu),
        "storage_blocks": entry.blocks(Medium::Storage),
        "missing_share": entry.drift(),
    })
}

fn connection(state: plane::State) -> String {
    match state {
        plane::State::Connecting { reason } => format!("connecting: {reason}"),
        plane::State::Ready => "ready".to_owned(),
        plane::State::Draining => "draining".to_owned(),
        plane::State::Gone { message, .. } => format!("refused: {message}"),
    }
}
