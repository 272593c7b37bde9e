//! Ten million changes to an index, as many workers' caches make them; then what that took.
//!
//! Each worker has conversations that grow turn by turn behind a few system prompts, in a cache that forgets the one that
//! was idle longest from its end. At the end each cache is compared with what the index says of it.
//!
//! usage: cargo run --release -p stator-router --example soak [EVENTS]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stator_router::BlockHash;
use stator_router::index::{Index, LANES, Matches, Target};

const WORKERS: usize = 256;
/// Blocks of each cache.
const CAPACITY: usize = 20_000;
/// Blocks of a conversation at most.
const LONGEST: usize = 600;
/// Changes between two lines of the report.
const REPORT: u64 = 1_000_000;

struct Worker {
    target: Target,
    /// The one that was idle longest first; of each its blocks after the system prompt's.
    talks: VecDeque<(usize, Vec<BlockHash>)>,
    held: usize,
}

fn main() {
    let most: u64 = std::env::args()
        .nth(1)
        .map_or(10_000_000, |events| events.parse().expect("a number"));
    let mut random = StdRng::seed_from_u64(1);
    let index = Index::new(LANES, random.random());
    let systems: Vec<Vec<BlockHash>> = (0..16).map(|n| chain(&mut random, 16 + 8 * n)).collect();
    let mut workers: Vec<_> = (0..WORKERS)
        .map(|_| Worker {
            target: index.join(),
            talks: VecDeque::new(),
            held: 0,
        })
        .collect();
    let (mut events, mut blocks, mut spent) = (0, 0, Duration::ZERO);
    println!("events, M blocks, ns per block, M (block, worker), bytes per (block, worker)");
    while events < most {
        let worker = &mut workers[random.random_range(0..WORKERS)];
        let stored = turn(worker, &systems, &mut random);
        let since = Instant::now();
        index.insert(worker.target, &stored);
        spent += since.elapsed();
        blocks += stored.len();
        events += 1;
        while worker.held > CAPACITY {
            let gone = forget(worker, random.random_range(1..8));
            let since = Instant::now();
            index.remove(worker.target, &gone);
            spent += since.elapsed();
            blocks += gone.len();
            events += 1;
            report(&index, events, blocks, spent);
        }
        if random.random_ratio(1, 200_000) {
            worker.talks.clear();
            worker.held = 0;
            index.clear(worker.target);
        }
        report(&index, events, blocks, spent);
    }
    check(&index, &workers, &systems);
}

/// Returns what a conversation's next turn adds to a worker's cache.
fn turn(worker: &mut Worker, systems: &[Vec<BlockHash>], random: &mut StdRng) -> Vec<BlockHash> {
    let goes_on = worker.talks.len() > 8 && random.random_bool(0.8);
    let (system, mut talk) = if goes_on {
        let recent = worker.talks.len() / 2..worker.talks.len();
        let nth = random.random_range(recent);
        worker.talks.remove(nth).expect("in range")
    } else {
        (random.random_range(0..systems.len()), Vec::new())
    };
    let mut stored = Vec::new();
    if talk.is_empty() {
        // It may be there already; the engine tells anyway of a block that it gave up meanwhile.
        stored.extend_from_slice(&systems[system]);
    }
    let len = random.random_range(2..40);
    let new = chain(random, len);
    stored.extend_from_slice(&new);
    worker.held += new.len();
    talk.extend(new);
    if talk.len() < LONGEST {
        worker.talks.push_back((system, talk));
    } else {
        worker.talks.push_front((system, talk));
    }
    stored
}

/// Returns what makes room, from the end of the conversation that was idle longest.
fn forget(worker: &mut Worker, count: usize) -> Vec<BlockHash> {
    let (_, oldest) = worker.talks.front_mut().expect("something is held");
    let gone: Vec<_> = oldest
        .drain(oldest.len().saturating_sub(count)..)
        .rev()
        .collect();
    if oldest.is_empty() {
        worker.talks.pop_front();
    }
    worker.held -= gone.len();
    gone
}

/// Returns names of blocks that nobody has.
fn chain(random: &mut StdRng, blocks: usize) -> Vec<BlockHash> {
    (0..blocks).map(|_| BlockHash(random.random())).collect()
}

fn report(index: &Index, events: u64, blocks: usize, spent: Duration) {
    if events.is_multiple_of(REPORT) {
        let memory = index.memory();
        println!(
            "{events}, {:.1}, {:.1}, {:.2}, {:.1}",
            blocks as f64 / 1e6,
            spent.as_nanos() as f64 / blocks as f64,
            memory.held as f64 / 1e6,
            memory.bytes as f64 / memory.held as f64,
        );
    }
}

fn check(index: &Index, workers: &[Worker], systems: &[Vec<BlockHash>]) {
    let mut matches = Matches::default();
    let mut talks = 0;
    for worker in workers {
        for (system, talk) in &worker.talks {
            index.matches(talk, &mut matches);
            assert_eq!(matches.blocks(worker.target) as usize, talk.len());
            index.matches(&systems[*system], &mut matches);
            assert_eq!(
                matches.blocks(worker.target) as usize,
                systems[*system].len()
            );
            talks += 1;
        }
    }
    println!("{talks} conversations are where they should be");
}
