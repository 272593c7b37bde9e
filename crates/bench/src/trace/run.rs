//! A fleet of simulated engines behind the real router, from event to event.

use std::time::Duration;

use stator_common::WorkerId;
use stator_common::events::Medium;
use stator_router::index::Target;
use stator_router::{
    Booking, Cached, Caches, Candidate, Ledger, Measure, Overlaps, Policy, Room, Router, Share,
    Source, Weights,
};

use super::agenda::Agenda;
use super::engine::{CAPACITY, Engine, MOST_RUNNING, Progress, Told};
use super::workload::{BLOCK, Request};

/// From a change in a cache to a router that knows: engine, relay, network.
pub(super) const NEWS: f64 = 0.005;

/// Who chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Chooser {
    RoundRobin,
    LeastLoaded,
    Approx(Weights),
    Kv(Weights),
    /// Knows what is in every engine at that moment, how far it is and how long its answers will be, and takes the
    /// one where the first token comes first.
    Oracle,
}

impl Chooser {
    pub(crate) const ALL: [Self; 5] = [
        Self::RoundRobin,
        Self::LeastLoaded,
        Self::Approx(Weights::WHOLE),
        Self::Kv(Weights::WHOLE),
        Self::Oracle,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastLoaded => "least-loaded",
            Self::Approx(_) => "approx",
            Self::Kv(_) => "kv",
            Self::Oracle => "oracle",
        }
    }

    fn policy(self) -> Policy {
        match self {
            Self::RoundRobin | Self::Oracle => Policy::RoundRobin,
            Self::LeastLoaded => Policy::LeastLoaded(Measure::Requests),
            Self::Approx(weights) | Self::Kv(weights) => Policy::Kv(weights),
        }
    }

    fn source(self) -> Option<Source> {
        match self {
            Self::Approx(_) => Some(Source::Learned),
            Self::Kv(_) => Some(Source::Told),
            Self::RoundRobin | Self::LeastLoaded | Self::Oracle => None,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Seconds to first tokens, ascending.
    pub(crate) ttft: Vec<f64>,
    /// Share of the prompts' tokens that came from caches.
    pub(crate) hits: f64,
    /// Unfinished requests of the fullest worker beside the mean, averaged over time.
    pub(crate) balance: f64,
}

impl Outcome {
    /// Returns what came out for all requests.
    ///
    /// - `ttft`: seconds, in any order.
    /// - `cached`: tokens that came from caches.
    /// - `balance`: the sum of what was looked at now and then, and how often that was.
    pub(crate) fn of(
        requests: &[Request],
        mut ttft: Vec<f64>,
        cached: usize,
        balance: (f64, f64),
    ) -> Self {
        ttft.sort_by(f64::total_cmp);
        let prompts: usize = requests.iter().map(|request| request.prompt).sum();
        Self {
            ttft,
            hits: cached as f64 / prompts as f64,
            balance: balance.0 / balance.1.max(1.0),
        }
    }

    /// Returns a quantile of the times to first tokens.
    pub(crate) fn ttft(&self, share: f64) -> f64 {
        let at = (self.ttft.len() as f64 * share) as usize;
        self.ttft[at.min(self.ttft.len() - 1)]
    }

    pub(crate) fn mean(&self) -> f64 {
        self.ttft.iter().sum::<f64>() / self.ttft.len() as f64
    }
}

#[derive(Debug)]
enum What {
    Arrival(usize),
    Step(usize),
    News(usize, Told),
    Second,
}

/// Runs requests through so many workers.
pub(crate) fn run(requests: &[Request], workers: usize, chooser: Chooser, seed: u64) -> Outcome {
    let mut fleet = Fleet::new(requests, workers, chooser, seed);
    for (number, request) in requests.iter().enumerate() {
        fleet.agenda.note(request.at, What::Arrival(number));
    }
    fleet.agenda.note(1.0, What::Second);
    while let Some((at, what)) = fleet.agenda.next() {
        fleet.now = at;
        match what {
            What::Arrival(number) => fleet.arrive(number),
            What::Step(worker) => fleet.step(worker),
            What::News(worker, told) => fleet.hear(worker, told),
            What::Second => fleet.second(),
        }
    }
    fleet.outcome()
}

struct Fleet<'a> {
    requests: &'a [Request],
    chooser: Chooser,
    now: f64,
    agenda: Agenda<What>,
    router: Router,
    caches: Caches,
    overlaps: Overlaps,
    workers: Vec<Worker>,
    bookings: Vec<Option<Booking>>,
    ttft: Vec<f64>,
    cached: usize,
    unfinished: usize,
    balance: (f64, f64),
}

struct Worker {
    id: WorkerId,
    engine: Engine,
    ledger: Ledger,
    target: Target,
}

impl<'a> Fleet<'a> {
    fn new(requests: &'a [Request], workers: usize, chooser: Chooser, seed: u64) -> Self {
        let caches = Caches::new(seed);
        let source = chooser.source().unwrap_or(Source::Learned);
        let worker = |n| Worker {
            id: WorkerId(format!("w{n}")),
            engine: Engine::default(),
            ledger: Ledger::default(),
            target: caches.join(source, CAPACITY as u64),
        };
        Self {
            workers: (0..workers).map(worker).collect(),
            requests,
            chooser,
            now: 0.0,
            agenda: Agenda::new(),
            router: Router::new(chooser.policy(), seed),
            caches,
            overlaps: Overlaps::default(),
            bookings: requests.iter().map(|_| None).collect(),
            ttft: Vec::new(),
            cached: 0,
            unfinished: requests.len(),
            balance: (0.0, 0.0),
        }
    }

    fn arrive(&mut self, number: usize) {
        let request = &self.requests[number];
        let blocks = request.prompt_blocks();
        let prompt = request.prompt as u64;
        let looks = self.chooser.source().is_some();
        if looks {
            let useful = &blocks[..blocks.len().min((request.prompt - 1) / BLOCK)];
            self.caches.overlaps(useful, &mut self.overlaps);
        }
        let candidates: Vec<_> = self
            .workers
            .iter()
            .map(|worker| Candidate {
                cached: Cached {
                    device: if looks {
                        u64::from(self.overlaps.of(worker.target).device) * BLOCK as u64
                    } else {
                        0
                    },
                    ..Cached::default()
                },
                room: Room {
                    requests: MOST_RUNNING as u64,
                    kv_tokens: (CAPACITY * BLOCK) as u64,
                },
                ..Candidate::new(&worker.id, None, worker.ledger.load())
            })
            .collect();
        let chosen = match self.chooser {
            Chooser::Oracle => self.foresee(request),
            _ => {
                let choice = self.router.choose(&candidates, prompt);
                choice.expect("there are workers").index
            }
        };
        let share = Share {
            prompt,
            cached: candidates[chosen].cached.device,
            prefilled: false,
        };
        drop(candidates);
        self.bookings[number] = Some(self.workers[chosen].ledger.book(share));
        if looks {
            let now = Duration::from_secs_f64(self.now);
            let target = self.workers[chosen].target;
            self.caches.sent(target, blocks, now);
        }
        self.workers[chosen].engine.submit(number, request);
        self.begin(chosen);
    }

    fn foresee(&self, request: &Request) -> usize {
        let forecast = |worker: &Worker| {
            let blocks = request.prompt_blocks();
            worker.engine.forecast(request.prompt, blocks)
        };
        let forecasts: Vec<_> = self.workers.iter().map(forecast).collect();
        let least = forecasts.iter().copied().fold(f64::INFINITY, f64::min);
        // Who is equally good for this one and has less to do is better for the next.
        let good = (0..forecasts.len()).filter(|&n| forecasts[n] <= least * 1.02);
        good.min_by_key(|&n| self.workers[n].engine.requests())
            .unwrap_or(0)
    }

    fn begin(&mut self, worker: usize) {
        let engine = &mut self.workers[worker].engine;
        if engine.busy {
            return;
        }
        if let Some(seconds) = engine.begin() {
            engine.busy = true;
            let at = self.now + seconds;
            self.agenda.note(at, What::Step(worker));
        }
        self.tell(worker);
    }

    fn step(&mut self, worker: usize) {
        let mut progress = Vec::new();
        let engine = &mut self.workers[worker].engine;
        engine.end(&mut progress);
        engine.busy = false;
        for one in progress {
            match one {
                Progress::First { request, cached } => {
                    self.ttft.push(self.now - self.requests[request].at);
                    self.cached += cached;
                    self.generated(request);
                }
                Progress::Token { request } => self.generated(request),
                Progress::Done { request } => {
                    self.bookings[request] = None;
                    self.unfinished -= 1;
                }
            }
        }
        self.begin(worker);
    }

    fn generated(&mut self, request: usize) {
        if let Some(booking) = &mut self.bookings[request] {
            booking.generated(1);
        }
    }

    /// Lets the router hear what a cache did, in a while.
    fn tell(&mut self, worker: usize) {
        let told = std::mem::take(&mut self.workers[worker].engine.told);
        if matches!(self.chooser, Chooser::Kv(_)) {
            let at = self.now + NEWS;
            for told in told {
                self.agenda.note(at, What::News(worker, told));
            }
        }
    }

    fn hear(&mut self, worker: usize, told: Told) {
        let target = self.workers[worker].target;
        match told {
            Told::Stored(hashes) => self.caches.stored(target, Medium::Gpu, &hashes),
            Told::Removed(hashes) => self.caches.removed(target, Medium::Gpu, &hashes),
        }
    }

    fn second(&mut self) {
        self.caches.expire(Duration::from_secs_f64(self.now));
        let counts = || self.workers.iter().map(|one| one.engine.requests() as f64);
        let sum: f64 = counts().sum();
        if sum > 0.0 {
            let fullest = counts().fold(0.0, f64::max);
            self.balance.0 += fullest * self.workers.len() as f64 / sum;
            self.balance.1 += 1.0;
        }
        if self.unfinished > 0 {
            let at = self.now + 1.0;
            self.agenda.note(at, What::Second);
        }
    }

    fn outcome(self) -> Outcome {
        Outcome::of(self.requests, self.ttft, self.cached, self.balance)
    }
}
