//! One line that all processors share: workers with room ask for prompts, as over a NATS server.
//!
//! The decision is the real one (`Backlog::pull`). A worker sees to one ticket at a time, and each takes a round trip:
//! the ticket comes, the processor is asked and answers.

use std::collections::VecDeque;
use std::time::Duration;

use stator_router::Load;
use stator_router::backlog::{self, Claim, Pulled};

use super::super::engine::{BUDGET, PREFILL};
use super::{BLOCK, Fleet, ROOM, WAY, What};

/// How long a prompt is kept for a worker that has more of it cached, at most and at least, in seconds; a ticket pauses no
/// longer than the last. Those of processors.
const MOST_KEPT: f64 = 2.0;
const LEAST_KEPT: f64 = 0.002;
const LONGEST_PAUSE: f64 = 0.05;

/// Who stands in line, and by which ticket.
#[derive(Default)]
pub(super) struct Line {
    anybody: VecDeque<usize>,
    /// By worker.
    own: Vec<VecDeque<usize>>,
    /// By ticket, the prompt that waits by it; tickets have the numbers of the prompts that they were written for.
    waits: Vec<Option<usize>>,
    /// By prompt.
    ticket: Vec<usize>,
    /// Workers that see to a ticket.
    asks: Vec<bool>,
    /// What runs at workers or is on its way there.
    held: Vec<Load>,
    /// By prompt, the worker and what it is to compute there.
    costs: Vec<(usize, u64)>,
}

impl Line {
    pub(super) fn new(requests: usize, workers: usize) -> Self {
        Self {
            anybody: VecDeque::new(),
            own: vec![VecDeque::new(); workers],
            waits: vec![None; requests],
            ticket: (0..requests).collect(),
            asks: vec![false; workers],
            held: vec![Load::default(); workers],
            costs: vec![(0, 0); requests],
        }
    }
}

impl Fleet<'_> {
    /// Lets a prompt stand in line.
    pub(super) fn enter(&mut self, number: usize) {
        let at = number % self.setting.processors;
        let cached = self.cached_at(at, number);
        let backlog = &mut self.processors[at].backlog;
        let place = backlog.place();
        backlog.insert(place, self.requests[number].prompt as u64, number);
        self.line.waits[number] = Some(number);
        let most = cached.iter().copied().max().unwrap_or(0);
        let first = cached.iter().rposition(|one| *one == most).unwrap_or(0);
        let others = cached.iter().enumerate().filter(|(nth, _)| *nth != first);
        let next = others.map(|(_, cached)| *cached).max().unwrap_or(most);
        let kept = kept(most - next);
        if kept < LEAST_KEPT {
            self.stand(number, None);
        } else {
            self.agenda.note(self.now + kept, What::Stand(number, None));
            self.stand(number, Some(first));
        }
    }

    /// Puts a ticket into the line, for one worker or for anybody, if somebody waits by it.
    pub(super) fn stand(&mut self, ticket: usize, only: Option<usize>) {
        if self.line.waits[ticket].is_none() {
            return;
        }
        match only {
            Some(worker) => {
                self.line.own[worker].push_back(ticket);
                self.ask(worker);
            }
            None => {
                self.line.anybody.push_back(ticket);
                // The server gives it to who asked first; of idle ones it does not matter which.
                for worker in 0..self.setting.workers {
                    self.ask(worker);
                }
            }
        }
    }

    /// Lets a worker with room see to the next ticket.
    pub(super) fn ask(&mut self, worker: usize) {
        let line = &mut self.line;
        if line.asks[worker] || !backlog::has_room(&line.held[worker], ROOM, BUDGET as u64) {
            return;
        }
        let mine = line.own[worker].pop_front().map(|ticket| (ticket, true));
        let next = mine.or_else(|| line.anybody.pop_front().map(|ticket| (ticket, false)));
        if let Some((ticket, own)) = next {
            line.asks[worker] = true;
            let only = own.then_some(worker);
            self.agenda
                .note(self.now + 2.0 * WAY, What::Offer(worker, ticket, only));
        }
    }

    /// Answers a worker that has a ticket.
    pub(super) fn offer(&mut self, worker: usize, ticket: usize, only: Option<usize>) {
        self.line.asks[worker] = false;
        if self.line.waits[ticket].is_some() {
            let at = ticket % self.setting.processors;
            match self.pull(at, worker) {
                Pulled::Take(place) => {
                    if let Some(number) = self.processors[at].backlog.take(place) {
                        self.pass_on(ticket, number);
                        self.hold(at, worker, number);
                    }
                }
                Pulled::Later(pause) => {
                    let pause = pause.as_secs_f64().clamp(LEAST_KEPT, LONGEST_PAUSE);
                    self.agenda
                        .note(self.now + pause, What::Stand(ticket, only));
                }
                Pulled::Nothing => {}
            }
        }
        self.agenda.note(self.now + WAY, What::Ask(worker));
    }

    fn pull(&mut self, at: usize, worker: usize) -> Pulled {
        let (now, requests) = (self.now, self.requests);
        let processor = &mut self.processors[at];
        let (caches, targets) = (&processor.caches, &processor.targets);
        let overlaps = &mut processor.overlaps;
        processor.backlog.pull(targets.len(), |number| {
            let request = &requests[*number];
            caches.overlaps(request.useful_blocks(), overlaps);
            let of = |nth: usize| u64::from(overlaps.of(targets[nth]).device) * BLOCK as u64;
            let most = (0..targets.len()).map(of).max().unwrap_or(0);
            let cached = of(worker);
            let kept = kept(most - cached);
            let waited = now - request.at;
            if waited >= kept {
                Claim::Now { cached }
            } else {
                Claim::Later(Duration::from_secs_f64(kept - waited))
            }
        })
    }

    /// Gives the ticket of who was served by another's to that one.
    fn pass_on(&mut self, used: usize, served: usize) {
        let line = &mut self.line;
        let own = line.ticket[served];
        line.waits[own] = None;
        if own != used
            && let Some(number) = line.waits[used].take()
        {
            line.waits[own] = Some(number);
            line.ticket[number] = own;
        }
    }

    fn hold(&mut self, at: usize, worker: usize, number: usize) {
        let cached = self.cached_at(at, number)[worker];
        let cost = self.requests[number].prompt as u64 - cached;
        self.line.costs[number] = (worker, cost);
        let held = &mut self.line.held[worker];
        held.requests += 1;
        held.prefill_tokens += cost;
        self.give(at, number, &[worker]);
    }

    /// Notes that a worker has computed a prompt.
    pub(super) fn let_go(&mut self, number: usize) {
        let (worker, cost) = self.line.costs[number];
        let held = &mut self.line.held[worker];
        held.requests -= 1;
        held.prefill_tokens -= cost;
        self.ask(worker);
    }

    /// Returns the tokens of a prompt that each worker has cached, as far as a processor knows.
    fn cached_at(&mut self, at: usize, number: usize) -> Vec<u64> {
        let request = &self.requests[number];
        let processor = &mut self.processors[at];
        let overlaps = &mut processor.overlaps;
        processor.caches.overlaps(request.useful_blocks(), overlaps);
        let targets = processor.targets.iter();
        let cached = targets.map(|target| u64::from(overlaps.of(*target).device) * BLOCK as u64);
        cached.collect()
    }
}

/// How long a prompt is kept from a worker that lacks so many tokens more than another.
fn kept(lacks: u64) -> f64 {
    (lacks as f64 * PREFILL).min(MOST_KEPT)
}
