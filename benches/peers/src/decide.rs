//! The decision among 32, 1,024 and 10,000 workers, caches and loads of all of them at hand.

use std::collections::{HashMap, HashSet};
use std::hint::black_box;
use std::time::Instant;

use dynamo_kv_router::protocols::{
    RoutingConstraints, WorkerConfigLike, WorkerId as PeerId, WorkerWithDpRank,
};
use dynamo_kv_router::scheduling::{OverlapSignals, ScheduleMode};
use dynamo_kv_router::{
    DefaultWorkerSelector, KvRouterConfig, SchedulingRequest, WorkerLoadProjection,
    WorkerSelectionInput, WorkerSelector,
};
use stator_common::ids::WorkerId;
use stator_router::{Cached, Candidate, Load, Policy, Room, Router, Weights};

const WORKERS: [usize; 3] = [32, 1024, 10_000];
const PROMPT: u64 = 2048;

/// Prints the decision's times.
pub fn print(rounds: usize) {
    println!("| decision, us | stator-router | dynamo-kv-router 1.6.1 |");
    println!("| --- | ---: | ---: |");
    for temperature in [0.0, 0.7] {
        for workers in WORKERS {
            let mut best = [f64::INFINITY; 2];
            for _ in 0..rounds {
                best[0] = best[0].min(ours(workers, temperature));
                best[1] = best[1].min(peer(workers, temperature));
            }
            println!(
                "| {workers} workers, temperature {temperature} | {:.2} | {:.2} |",
                best[0], best[1]
            );
        }
    }
}

fn cached(worker: usize) -> u64 {
    (worker % 32) as u64 * 64
}

fn load(worker: usize) -> Load {
    Load {
        requests: (worker % 17) as u64,
        prefill_tokens: (worker * 16) as u64,
        decode_tokens: (worker % 127 * 16) as u64,
        kv_tokens: 0,
        generating: (worker % 17) as u64,
    }
}

fn ours(workers: usize, temperature: f64) -> f64 {
    let ids: Vec<_> = (0..workers).map(|n| WorkerId(format!("w{n}"))).collect();
    let candidates: Vec<_> = ids
        .iter()
        .enumerate()
        .map(|(n, worker)| Candidate {
            cached: Cached {
                device: cached(n),
                ..Cached::default()
            },
            room: Room {
                requests: 256,
                kv_tokens: 131_072 * 16,
            },
            ..Candidate::new(worker, None, load(n))
        })
        .collect();
    let weights = Weights {
        temperature,
        ..Weights::WHOLE
    };
    let mut router = Router::new(Policy::Kv(weights), 1);
    median(workers, || {
        black_box(router.choose(black_box(&candidates), PROMPT).expect("some"));
    })
}

#[derive(Default)]
struct Peer(HashSet<String>);

impl WorkerConfigLike for Peer {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        None
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        Some(131_072)
    }

    fn taints(&self) -> &HashSet<String> {
        &self.0
    }
}

/// As in its own `benches/worker_selection.rs`.
fn peer(workers: usize, temperature: f64) -> f64 {
    let mut configs = HashMap::new();
    let mut overlap = OverlapSignals {
        tier_overlap_blocks: Default::default(),
        effective_overlap_blocks: Default::default(),
        effective_cached_tokens: Default::default(),
    };
    let mut worker_loads: rustc_hash::FxHashMap<_, _> = Default::default();
    for n in 0..workers {
        let worker = WorkerWithDpRank::from_worker_id(n as PeerId);
        let load = load(n);
        configs.insert(n as PeerId, Peer::default());
        overlap
            .effective_overlap_blocks
            .insert(worker, cached(n) as f64 / 16.0);
        overlap
            .effective_cached_tokens
            .insert(worker, cached(n) as usize);
        worker_loads.insert(
            worker,
            WorkerLoadProjection {
                active_prefill_tokens: load.prefill_tokens as usize,
                active_decode_blocks: (load.decode_tokens / 16) as usize,
                active_requests: load.requests as usize,
                ..Default::default()
            },
        );
    }
    let request = SchedulingRequest {
        mode: ScheduleMode::QueryOnly { request_id: None },
        token_seq: None,
        isl_tokens: PROMPT as usize,
        lora_name: None,
        expected_output_tokens: Some(256),
        affinity_target: None,
        pinned_worker: None,
        allowed_worker_ids: None,
        routing_constraints: RoutingConstraints {
            required_taints: HashSet::new(),
            preferred_taints: Default::default(),
        },
        router_config_override: None,
        track_prefill_tokens: true,
        priority_jump: 0.0,
        strict_priority: 0,
        policy_class: None,
        session_context: None,
        overlap,
        kv_transfer_candidates: None,
        retain_kv_transfer_chain: false,
        shared_cache_hits: None,
        worker_loads,
        resp_tx: None,
    };
    let config = KvRouterConfig {
        router_temperature: temperature,
        ..Default::default()
    };
    let selector = DefaultWorkerSelector::new(Some(config), "prefill");
    median(workers, || {
        let input = WorkerSelectionInput::configured(
            black_box(&configs),
            black_box(&request),
            request.eligibility(),
            16,
        );
        black_box(selector.select_worker(input).expect("some"));
    })
}

/// Returns microseconds: the median over batches.
fn median(workers: usize, mut decide: impl FnMut()) -> f64 {
    let each = (200_000 / workers).clamp(10, 5000);
    let mut times: Vec<_> = (0..30)
        .map(|_| {
            let since = Instant::now();
            (0..each).for_each(|_| decide());
            since.elapsed().as_secs_f64() * 1e6 / each as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
