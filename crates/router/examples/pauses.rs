//! How long the longest changes of an index take, at different sizes: what a lookup may have to wait for.
//!
//! Stores prompts of 128 blocks until there are as many blocks as asked for, then replaces some of them, then empties all
//! caches and cleans up. Times are CPU times of the thread: what else the machine does meanwhile is no pause of ours. Memory
//! is given out by mimalloc, as in what we ship.
//!
//! usage: cargo run --release -p stator-router --example pauses [BLOCKS]...

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stator_router::BlockHash;
use stator_router::index::{Index, LANES};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const WORKERS: usize = 64;
/// Blocks of a prompt.
const PROMPT: usize = 128;
/// Prompts that are replaced at most.
const REPLACED: usize = 100_000;

fn main() {
    let sizes: Vec<usize> = std::env::args()
        .skip(1)
        .map(|size| size.parse().expect("a number of blocks"))
        .collect();
    let sizes = if sizes.is_empty() {
        vec![1_000_000, 5_000_000, 20_000_000]
    } else {
        sizes
    };
    println!("| blocks | change | mean, us | 99.9 %, us | longest five, ms |");
    println!("| ---: | --- | ---: | ---: | --- |");
    for size in sizes {
        measure(size);
    }
}

fn measure(size: usize) {
    let mut random = StdRng::seed_from_u64(1);
    let index = Index::new(LANES, random.random());
    let targets: Vec<_> = (0..WORKERS).map(|_| index.join()).collect();
    let mut prompt = || -> Vec<BlockHash> {
        let names = (0..PROMPT).map(|_| BlockHash(random.random()));
        names.collect()
    };
    let mut held = VecDeque::new();
    let mut stores = Vec::new();
    for nth in 0..size / PROMPT {
        let (target, hashes) = (targets[nth % WORKERS], prompt());
        stores.push(timed(|| {
            index.insert(target, &hashes);
        }));
        held.push_back((target, hashes));
    }
    report(size, "store", stores);

    let (mut removals, mut stores) = (Vec::new(), Vec::new());
    for _ in 0..held.len().min(REPLACED) {
        let (target, mut hashes) = held.pop_front().expect("something is held");
        hashes.reverse();
        removals.push(timed(|| index.remove(target, &hashes)));
        let hashes = prompt();
        stores.push(timed(|| {
            index.insert(target, &hashes);
        }));
        held.push_back((target, hashes));
    }
    report(size, "remove", removals);
    report(size, "store again", stores);

    let clear = |&target: &_| timed(|| index.clear(target));
    report(size, "clear", targets.iter().map(clear).collect());
    let mut sweeps = Vec::new();
    let mut left = true;
    while left {
        sweeps.push(timed(|| left = index.sweep()));
    }
    report(size, "clean up", sweeps);
}

fn timed(change: impl FnOnce()) -> Duration {
    let since = cpu_time();
    change();
    cpu_time() - since
}

fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a value of the right type that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn report(size: usize, change: &str, mut times: Vec<Duration>) {
    if times.is_empty() {
        return;
    }
    times.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let mean = us(times.iter().sum::<Duration>()) / times.len() as f64;
    let most = us(times[(times.len() - 1) * 999 / 1000]);
    let longest = times.iter().rev().take(5);
    let longest: Vec<_> = longest
        .map(|&time| format!("{:.2}", us(time) / 1e3))
        .collect();
    println!(
        "| {size} | {change} | {mean:.1} | {most:.1} | {} |",
        longest.join(" ")
    );
}
