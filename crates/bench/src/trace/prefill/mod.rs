//! Prefill workers behind one or several processors, from event to event: prompts that are pushed to a worker at once,
//! beside prompts that wait at a processor until one has room, or in a line that all processors share.
//!
//! Engines compute prompts and give one token, as prefill workers do; what happens then is the same for both and left
//! out. Unlike in [`mod@super::run`], messages take their time, since that is what a worker with an empty queue waits for.

mod line;

use std::time::Duration;

use stator_common::WorkerId;
use stator_common::events::Medium;
use stator_router::backlog::{self, Backlog, Fit, Seat};
use stator_router::index::Target;
use stator_router::{
    Booking, Cached, Caches, Candidate, Ledger, Load, Overlaps, Policy, Room, Router, Share,
    Source, Weights,
};

use line::Line;

use super::agenda::Agenda;
use super::engine::{BUDGET, CAPACITY, Engine, MOST_RUNNING, Progress, Told};
use super::run::{NEWS, Outcome};
use super::workload::{BLOCK, Request};

/// From a processor to a worker's engine, and back.
const WAY: f64 = 0.001;

const ROOM: Room = Room {
    requests: MOST_RUNNING as u64,
    kv_tokens: (CAPACITY * BLOCK) as u64,
};

/// When a prompt is given to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dispatch {
    Push,
    Queue,
    /// When a worker with room asks; all processors share a line.
    Line,
}

/// Who serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) workers: usize,
    pub(crate) processors: usize,
    pub(crate) dispatch: Dispatch,
    /// How often processors tell each other what they booked, in seconds, if they do.
    pub(crate) sync: Option<f64>,
    pub(crate) seed: u64,
}

#[derive(Debug)]
enum What {
    Arrival(usize),
    /// A prompt is at its worker.
    There(usize, usize),
    Step(usize),
    /// An answer is back.
    Back(usize),
    News(usize, Told),
    /// Processors tell each other.
    Tell,
    /// A ticket is put into the line, for a worker or for anybody.
    Stand(usize, Option<usize>),
    /// A worker may ask for the next ticket.
    Ask(usize),
    /// A processor hears of a worker that has a ticket, which was for that one or for anybody.
    Offer(usize, usize, Option<usize>),
    Second,
}

/// One processor, as far as it decides.
struct Processor {
    router: Router,
    caches: Caches,
    targets: Vec<Target>,
    ledgers: Vec<Ledger>,
    /// What others said that they booked, by worker.
    others: Vec<Load>,
    backlog: Backlog<usize>,
    overlaps: Overlaps,
}

struct Fleet<'a> {
    requests: &'a [Request],
    setting: Setting,
    now: f64,
    agenda: Agenda<What>,
    ids: Vec<WorkerId>,
    engines: Vec<Engine>,
    processors: Vec<Processor>,
    bookings: Vec<Option<Booking>>,
    ttft: Vec<f64>,
    cached: usize,
    balance: (f64, f64),
    line: Line,
}

/// Runs the prompts of requests through prefill workers.
pub(crate) fn run(requests: &[Request], setting: Setting) -> Outcome {
    let mut fleet = Fleet::new(requests, setting);
    for (number, request) in requests.iter().enumerate() {
        fleet.agenda.note(request.at, What::Arrival(number));
    }
    fleet.agenda.note(1.0, What::Second);
    if let Some(pause) = setting.sync {
        fleet.agenda.note(pause, What::Tell);
    }
    while let Some((at, what)) = fleet.agenda.next() {
        fleet.now = at;
        match what {
            What::Arrival(number) => fleet.arrive(number),
            What::There(worker, number) => {
                fleet.engines[worker].submit(number, &requests[number].prompt_alone());
                fleet.begin(worker);
            }
            What::Step(worker) => fleet.step(worker),
            What::Back(number) => fleet.back(number),
            What::News(worker, told) => fleet.hear(worker, &told),
            What::Tell => fleet.tell_others(),
            What::Stand(ticket, only) => fleet.stand(ticket, only),
            What::Ask(worker) => fleet.ask(worker),
            What::Offer(worker, ticket, only) => fleet.offer(worker, ticket, only),
            What::Second => fleet.second(),
        }
    }
    fleet.outcome()
}

impl<'a> Fleet<'a> {
    fn new(requests: &'a [Request], setting: Setting) -> Self {
        let processor = |nth: usize| {
            let caches = Caches::new(setting.seed);
            Processor {
                router: Router::new(Policy::Kv(Weights::PREFILL), setting.seed + nth as u64),
                targets: (0..setting.workers)
                    .map(|_| caches.join(Source::Told, CAPACITY as u64))
                    .collect(),
                caches,
                ledgers: (0..setting.workers).map(|_| Ledger::default()).collect(),
                others: vec![Load::default(); setting.workers],
                backlog: Backlog::default(),
                overlaps: Overlaps::default(),
            }
        };
        Self {
            requests,
            setting,
            now: 0.0,
            agenda: Agenda::new(),
            ids: (0..setting.workers)
                .map(|n| WorkerId(format!("p{n}")))
                .collect(),
            engines: (0..setting.workers).map(|_| Engine::default()).collect(),
            processors: (0..setting.processors).map(processor).collect(),
            bookings: requests.iter().map(|_| None).collect(),
            ttft: Vec::new(),
            cached: 0,
            balance: (0.0, 0.0),
            line: Line::new(requests.len(), setting.workers),
        }
    }

    fn arrive(&mut self, number: usize) {
        let at = number % self.setting.processors;
        match self.setting.dispatch {
            Dispatch::Push => {
                let all: Vec<_> = (0..self.setting.workers).collect();
                self.give(at, number, &all);
            }
            Dispatch::Queue => {
                let backlog = &mut self.processors[at].backlog;
                let place = backlog.place();
                backlog.insert(place, self.requests[number].prompt as u64, number);
                self.serve(at);
            }
            Dispatch::Line => self.enter(number),
        }
    }

    /// Lets workers with room take what waits at a processor.
    fn serve(&mut self, at: usize) {
        loop {
            let requests = self.requests;
            let processor = &mut self.processors[at];
            if processor.backlog.is_empty() {
                return;
            }
            let both = processor.ledgers.iter().zip(&processor.others);
            let seats: Vec<_> = both
                .map(|(ledger, others)| Seat {
                    queued: ledger.load().prefill_tokens + others.prefill_tokens,
                    // What a processor knows of others is too old to say who is idle.
                    room: backlog::has_room(&ledger.load(), ROOM, BUDGET as u64),
                })
                .collect();
            let (caches, targets, overlaps) = (
                &processor.caches,
                &processor.targets,
                &mut processor.overlaps,
            );
            let next = processor.backlog.next(&seats, |number, out| {
                let request = &requests[*number];
                caches.overlaps(request.useful_blocks(), overlaps);
                for (target, out) in targets.iter().zip(out) {
                    let cached = u64::from(overlaps.of(*target).device) * BLOCK as u64;
                    *out = Some(Fit {
                        cached,
                        uncached: request.prompt as u64 - cached,
                    });
                }
            });
            let Some(next) = next else {
                return;
            };
            let Some(number) = processor.backlog.take(next.place) else {
                return;
            };
            self.give(at, number, &next.targets);
        }
    }

    /// Gives a prompt to that one of some workers where it costs least.
    fn give(&mut self, at: usize, number: usize, workers: &[usize]) {
        let request = &self.requests[number];
        let processor = &mut self.processors[at];
        let (caches, overlaps) = (&processor.caches, &mut processor.overlaps);
        caches.overlaps(request.useful_blocks(), overlaps);
        let candidates: Vec<_> = workers
            .iter()
            .map(|&worker| Candidate {
                cached: Cached {
                    device: u64::from(overlaps.of(processor.targets[worker]).device) * BLOCK as u64,
                    ..Cached::default()
                },
                room: ROOM,
                ..Candidate::new(
                    &self.ids[worker],
                    None,
                    processor.ledgers[worker].load() + processor.others[worker],
                )
            })
            .collect();
        let choice = processor.router.choose(&candidates, request.prompt as u64);
        let chosen = choice.expect("there are workers").index;
        let share = Share {
            prompt: request.prompt as u64,
            cached: candidates[chosen].cached.device,
            prefilled: false,
        };
        drop(candidates);
        let worker = workers[chosen];
        self.bookings[number] = Some(processor.ledgers[worker].book(share));
        let now = Duration::from_secs_f64(self.now);
        let target = processor.targets[worker];
        processor.caches.sent(target, request.prompt_blocks(), now);
        self.agenda
            .note(self.now + WAY, What::There(worker, number));
    }

    fn begin(&mut self, worker: usize) {
        let engine = &mut self.engines[worker];
        if !engine.busy
            && let Some(seconds) = engine.begin()
        {
            engine.busy = true;
            self.agenda.note(self.now + seconds, What::Step(worker));
        }
        for told in std::mem::take(&mut self.engines[worker].told) {
            self.agenda.note(self.now + NEWS, What::News(worker, told));
        }
    }

    fn step(&mut self, worker: usize) {
        let mut progress = Vec::new();
        let engine = &mut self.engines[worker];
        engine.end(&mut progress);
        engine.busy = false;
        for one in progress {
            match one {
                Progress::First { request, cached } => {
                    self.cached += cached;
                    if self.setting.dispatch == Dispatch::Line {
                        self.let_go(request);
                    }
                    self.agenda.note(self.now + WAY, What::Back(request));
                }
                Progress::Token { .. } | Progress::Done { .. } => {}
            }
        }
        self.begin(worker);
    }

    fn back(&mut self, number: usize) {
        self.ttft.push(self.now - self.requests[number].at);
        self.bookings[number] = None;
        if self.setting.dispatch == Dispatch::Queue {
            self.serve(number % self.setting.processors);
        }
    }

    fn hear(&mut self, worker: usize, told: &Told) {
        for processor in &self.processors {
            let (caches, target) = (&processor.caches, processor.targets[worker]);
            match told {
                Told::Stored(hashes) => caches.stored(target, Medium::Gpu, hashes),
                Told::Removed(hashes) => caches.removed(target, Medium::Gpu, hashes),
            }
        }
    }

    fn tell_others(&mut self) {
        let loads: Vec<Vec<Load>> = self
            .processors
            .iter()
            .map(|processor| processor.ledgers.iter().map(Ledger::load).collect())
            .collect();
        for (at, processor) in self.processors.iter_mut().enumerate() {
            for (worker, sum) in processor.others.iter_mut().enumerate() {
                let others = loads.iter().enumerate().filter(|(other, _)| *other != at);
                *sum = others.fold(Load::default(), |sum, (_, loads)| sum + loads[worker]);
            }
        }
        if let Some(pause) = self.setting.sync
            && self.ttft.len() < self.requests.len()
        {
            self.agenda.note(self.now + pause, What::Tell);
        }
    }

    fn second(&mut self) {
        let now = Duration::from_secs_f64(self.now);
        for processor in &self.processors {
            processor.caches.expire(now);
        }
        let counts = || self.engines.iter().map(|one| one.queued() as f64);
        let sum: f64 = counts().sum();
        if sum > 0.0 {
            let fullest = counts().fold(0.0, f64::max);
            self.balance.0 += fullest * self.engines.len() as f64 / sum;
            self.balance.1 += 1.0;
        }
        if self.ttft.len() < self.requests.len() {
            self.agenda.note(self.now + 1.0, What::Second);
        }
    }

    fn outcome(self) -> Outcome {
        Outcome::of(self.requests, self.ttft, self.cached, self.balance)
    }
}
