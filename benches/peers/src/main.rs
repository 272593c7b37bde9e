//! The router's index and decision beside those of `dynamo-kv-router` and `kv-index`, in one run.
//!
//! Each index is given the same prepared events on one thread, after the other two of the same round; the best
//! of some rounds counts, since whatever else the machine does can only make one slower. Times are CPU times of
//! the whole process, so that an index that works on threads of its own is not free; lookups run on the caller's
//! thread in all three, and are timed by the clock. Memory is what the allocator has given out and not
//! got back. Prints Markdown.
//!
//! usage: stator-bench-peers [--rounds N] [--only NAME]

mod alloc;
mod chain;
mod corpus;
mod decide;
mod dynamo;
mod ours;

use std::time::Instant;

use corpus::{Corpus, Event, What};

/// An index under test, with its events prepared.
pub trait Index {
    /// What it takes an event as.
    type Event;

    fn new(workers: usize) -> Self;
    /// Prepares an event; not timed.
    fn event(&self, event: &Event) -> Self::Event;
    fn apply(&mut self, event: Self::Event);
    /// Waits until all events have been applied.
    fn flush(&mut self) {}
    /// Looks a prompt up and returns how many workers hold its first block, and how many blocks the best one holds.
    fn look(&mut self, prompt: &corpus::Prompt) -> (usize, u32);
}

/// What was measured of an index.
#[derive(Clone, Copy, Debug)]
struct Figures {
    store_ns: f64,
    remove_ns: f64,
    mixed_ns: f64,
    bytes: f64,
    churned_bytes: f64,
    look_us: [f64; 3],
    hit_us: f64,
    miss_us: f64,
}

const HOLDERS: [usize; 3] = [1, 16, 256];

fn main() {
    let mut rounds = 5;
    let mut only = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next();
        match (argument.as_str(), value) {
            ("--rounds", Some(n)) => rounds = n.parse().expect("a number of rounds"),
            ("--only", Some(name)) => only = Some(name),
            _ => panic!("usage: stator-bench-peers [--rounds N] [--only NAME]"),
        }
    }
    let fleet = Corpus::fleet();
    let churn = Corpus::churn();
    let measure = |name: &str,
                   measure: &dyn Fn(&Corpus, &Corpus) -> Figures,
                   best: &mut Vec<(String, Figures)>| {
        if only.as_ref().is_some_and(|only| !name.contains(only)) {
            return;
        }
        let found = measure(&fleet, &churn);
        match best.iter_mut().find(|(known, _)| known == name) {
            Some((_, best)) => best.take_best(&found),
            None => best.push((name.to_owned(), found)),
        }
        eprintln!("{name}: {found:.1?}");
    };
    let mut best = Vec::new();
    for round in 0..rounds {
        eprintln!("round {}", round + 1);
        measure("stator-router", &figures::<ours::Ours>, &mut best);
        measure(
            "kv-index 2.0.0 (chain)",
            &figures::<chain::Chain>,
            &mut best,
        );
        measure(
            "dynamo-kv-router 1.6.1 (CRTC, default)",
            &figures::<dynamo::Compressed>,
            &mut best,
        );
        measure(
            "dynamo-kv-router 1.6.1 (radix tree)",
            &figures::<dynamo::Radix>,
            &mut best,
        );
    }
    print(&best);
    if only.is_none() {
        decide::print(rounds);
    }
}

impl Figures {
    fn take_best(&mut self, other: &Self) {
        let better = |a: &mut f64, b: f64| *a = a.min(b);
        better(&mut self.store_ns, other.store_ns);
        better(&mut self.remove_ns, other.remove_ns);
        better(&mut self.mixed_ns, other.mixed_ns);
        better(&mut self.hit_us, other.hit_us);
        better(&mut self.miss_us, other.miss_us);
        for (own, other) in self.look_us.iter_mut().zip(other.look_us) {
            better(own, other);
        }
        self.bytes = self.bytes.max(other.bytes);
        self.churned_bytes = self.churned_bytes.max(other.churned_bytes);
    }
}

fn figures<I: Index>(fleet: &Corpus, churn: &Corpus) -> Figures {
    let (mut index, store_ns, bytes) = filled::<I>(fleet);
    let prompts: Vec<_> = fleet.prompts.iter().collect();
    let hit_us = look(&mut index, &prompts, |(holders, deepest)| {
        assert!(holders >= 1 && deepest == 128, "{holders} {deepest}");
    });
    let strangers = Corpus::strangers();
    let strangers: Vec<_> = strangers.iter().collect();
    let miss_us = look(&mut index, &strangers, |(holders, _)| {
        assert_eq!(holders, 0)
    });
    let removals = fleet.removals();
    let blocks: usize = removals.iter().map(Event::len).sum();
    let events: Vec<_> = removals.iter().map(|event| index.event(event)).collect();
    let cpu = apply(&mut index, events);
    let remove_ns = cpu / blocks as f64;
    drop(index);

    let empty = alloc::live();
    let mut index = I::new(churn.workers);
    let blocks: usize = churn.events.iter().map(Event::len).sum();
    let events = churn.events.iter().map(|event| index.event(event));
    let events: Vec<_> = events.collect();
    let mixed_ns = apply(&mut index, events) / blocks as f64;
    let churned_bytes = alloc::live().saturating_sub(empty) as f64 / churn.held() as f64;
    drop(index);

    let look_us = HOLDERS.map(|holders| {
        let corpus = Corpus::held_by(holders);
        let (mut index, ..) = filled::<I>(&corpus);
        let prompts: Vec<_> = corpus.prompts.iter().collect();
        look(&mut index, &prompts, |(found, deepest)| {
            assert_eq!((found, deepest), (holders, 128));
        })
    });
    Figures {
        store_ns,
        remove_ns,
        mixed_ns,
        bytes,
        churned_bytes,
        look_us,
        hit_us,
        miss_us,
    }
}

/// Returns an index with a corpus in it, CPU nanoseconds per block, and bytes per block and worker.
fn filled<I: Index>(corpus: &Corpus) -> (I, f64, f64) {
    let mut index = I::new(corpus.workers);
    let blocks: usize = corpus.events.iter().map(Event::len).sum();
    let empty = alloc::live();
    let events: Vec<_> = corpus
        .events
        .iter()
        .map(|event| index.event(event))
        .collect();
    let cpu = apply(&mut index, events);
    let bytes = alloc::live().saturating_sub(empty) as f64 / blocks as f64;
    (index, cpu / blocks as f64, bytes)
}

/// Returns CPU nanoseconds.
fn apply<I: Index>(index: &mut I, events: Vec<I::Event>) -> f64 {
    let since = cpu_ns();
    for event in events {
        index.apply(event);
    }
    index.flush();
    (cpu_ns() - since) as f64
}

/// Returns microseconds per lookup: the median over batches of lookups.
fn look<I: Index>(index: &mut I, prompts: &[&corpus::Prompt], check: impl Fn((usize, u32))) -> f64 {
    prompts.iter().for_each(|prompt| check(index.look(prompt)));
    let mut times = Vec::new();
    for _ in 0..40 {
        let since = Instant::now();
        let mut count = 0;
        for prompt in prompts.iter().cycle().take(prompts.len().max(200)) {
            std::hint::black_box(index.look(prompt));
            count += 1;
        }
        times.push(since.elapsed().as_secs_f64() * 1e6 / f64::from(count));
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn cpu_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a value of the right type that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn print(best: &[(String, Figures)]) {
    let row = |name: &str, figure: &dyn Fn(&Figures) -> String| {
        let cells: Vec<_> = best.iter().map(|(_, figures)| figure(figures)).collect();
        println!("| {name} | {} |", cells.join(" | "));
    };
    let names: Vec<_> = best.iter().map(|(name, _)| name.as_str()).collect();
    println!("| | {} |", names.join(" | "));
    println!("| --- |{}", " ---: |".repeat(best.len()));
    let rate = |ns: f64| format!("{:.1} ({ns:.1} ns)", 1e3 / ns);
    row("store, M blocks/s", &|f| rate(f.store_ns));
    row("remove, M blocks/s", &|f| rate(f.remove_ns));
    row("store and remove mixed, M blocks/s", &|f| rate(f.mixed_ns));
    row("bytes per (block, worker), fleet", &|f| {
        format!("{:.1}", f.bytes)
    });
    row("bytes per (block, worker), after the mixed changes", &|f| {
        format!("{:.1}", f.churned_bytes)
    });
    for (nth, holders) in HOLDERS.iter().enumerate() {
        row(
            &format!("lookup, 128 blocks, {holders} holders, us"),
            &|f| format!("{:.2}", f.look_us[nth]),
        );
    }
    row("lookup in the fleet, 64 to 1 holders, us", &|f| {
        format!("{:.2}", f.hit_us)
    });
    row("lookup, held by nobody, us", &|f| {
        format!("{:.3}", f.miss_us)
    });
    println!();
}

impl Event {
    fn len(&self) -> usize {
        match &self.what {
            What::Store { blocks, .. } | What::Remove { blocks } => blocks.len(),
        }
    }
}
