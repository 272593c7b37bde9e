//! The policies and their decision.

use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stator_common::ids::WorkerId;

use crate::cost::{Cached, Room, Terms, Weights};
use crate::load::Load;

/// How a target is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Policy {
    /// One after the other.
    #[default]
    RoundRobin,
    /// Each with the same probability.
    Random,
    /// The one with the least booked on it; among equals, one after the other.
    LeastLoaded(Measure),
    /// The one where the request costs least ([`Terms`]), those without room last; among equals, each with the same
    /// probability.
    Kv(Weights),
}

/// What [`Policy::LeastLoaded`] compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Measure {
    /// Unfinished requests; tokens decide between equals.
    #[default]
    Requests,
    /// Tokens to prefill and tokens in decoding; requests decide between equals.
    Tokens,
}

/// A target that could serve the request: a worker, or one data-parallel rank of it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The worker.
    pub worker: &'a WorkerId,
    /// The rank within the worker; `None` lets the worker choose.
    pub dp_rank: Option<u32>,
    /// What is booked on the target.
    pub load: Load,
    /// What it has of the prompt.
    pub cached: Cached,
    /// How much it runs at once.
    pub room: Room,
}

impl<'a> Candidate<'a> {
    /// Returns a candidate of which only the load is known.
    pub fn new(worker: &'a WorkerId, dp_rank: Option<u32>, load: Load) -> Self {
        Self {
            worker,
            dp_rank,
            load,
            cached: Cached::default(),
            room: Room::default(),
        }
    }
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Index into the candidates that were given.
    pub index: usize,
    /// Why that one.
    pub reason: Reason,
}

/// Why a candidate was chosen, with the values that decided it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// There was no other.
    Only,
    /// Its turn.
    Turn {
        /// How many took part.
        of: usize,
    },
    /// Drawn.
    Drawn {
        /// How many took part.
        of: usize,
    },
    /// It had the least booked on it.
    LeastLoaded {
        /// What was booked on it.
        load: Load,
        /// How many candidates were equally good, itself included.
        equals: usize,
        /// How many took part.
        of: usize,
    },
    /// The request costs least there, or was drawn among those where it costs little.
    Cheapest {
        /// What it costs, and why.
        terms: Terms,
        /// How many candidates were equally good, itself included.
        equals: usize,
        /// How many took part.
        of: usize,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Only => f.write_str("the only candidate"),
            Reason::Turn { of } => write!(f, "its turn among {of}"),
            Reason::Drawn { of } => write!(f, "drawn among {of}"),
            Reason::LeastLoaded { load, equals, of } => write!(
                f,
                "least loaded of {of} ({} requests, {} tokens to prefill, {} decoding), {equals} alike",
                load.requests, load.prefill_tokens, load.decode_tokens,
            ),
            Reason::Cheapest { terms, equals, of } => {
                write!(f, "cheapest of {of} ({terms}), {equals} alike")
            }
        }
    }
}

/// The list of candidates was empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no worker serves the model")]
pub struct NoCandidates;

impl NoCandidates {
    /// Returns the code that a client sees.
    pub fn code(&self) -> stator_common::code::Code {
        stator_common::code::Code::Unavailable
    }
}

/// A policy with the little state that it keeps between decisions. A copy decides as the original would.
#[derive(Clone, Debug)]
pub struct Router {
    policy: Policy,
    /// Decisions made; turns are taken from it.
    turn: usize,
    random: StdRng,
    /// Used again, so that no decision allocates.
    costs: Vec<f64>,
}

impl Router {
    /// Returns a router. Equal seeds and equal questions give equal answers.
    pub fn new(policy: Policy, seed: u64) -> Self {
        Self {
            policy,
            turn: 0,
            random: StdRng::seed_from_u64(seed),
            costs: Vec::new(),
        }
    }

    /// Returns the policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Chooses one of `candidates` for a prompt of `prompt` tokens.
    ///
    /// # Errors
    /// [`NoCandidates`].
    pub fn choose(
        &mut self,
        candidates: &[Candidate<'_>],
        prompt: u64,
    ) -> Result<Choice, NoCandidates> {
        self.choose_by(self.policy, candidates, prompt)
    }

    /// Does what [`Router::choose`] does, by another policy.
    ///
    /// # Errors
    /// [`NoCandidates`].
    pub fn choose_by(
        &mut self,
        policy: Policy,
        candidates: &[Candidate<'_>],
        prompt: u64,
    ) -> Result<Choice, NoCandidates> {
        let of = candidates.len();
        if of == 0 {
            return Err(NoCandidates);
        }
        let turn = self.turn;
        self.turn = self.turn.wrapping_add(1);
        if of == 1 {
            return Ok(Choice {
                index: 0,
                reason: Reason::Only,
            });
        }
        Ok(match policy {
            Policy::RoundRobin => Choice {
                index: turn % of,
                reason: Reason::Turn { of },
            },
            Policy::Random => Choice {
                index: self.random.random_range(0..of),
                reason: Reason::Drawn { of },
            },
            Policy::LeastLoaded(measure) => least_loaded(candidates, measure, turn),
            Policy::Kv(weights) => self.cheapest(&weights, candidates, prompt),
        })
    }

    fn cheapest(&mut self, weights: &Weights, candidates: &[Candidate<'_>], prompt: u64) -> Choice {
        let of = candidates.len();
        let mut costs = std::mem::take(&mut self.costs);
        costs.clear();
        let mut some_room = false;
        costs.extend(candidates.iter().map(|candidate| {
            let terms = terms(weights, candidate, prompt);
            some_room |= !terms.full;
            // Below zero: full. So one number keeps both.
            if terms.full {
                -1.0 - terms.cost
            } else {
                terms.cost
            }
        }));
        if some_room {
            // Who has no room comes after everybody who has.
            costs
                .iter_mut()
                .filter(|cost| **cost < 0.0)
                .for_each(|cost| *cost = f64::INFINITY);
        } else {
            costs.iter_mut().for_each(|cost| *cost = -1.0 - *cost);
        }
        let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let equals = costs.iter().filter(|cost| **cost <= least).count();
        let index = if weights.temperature > 0.0 {
            let unit = weights.temperature * prompt.max(1) as f64;
            self.draw(&costs, |cost| ((least - cost) / unit).exp())
        } else if equals == 1 {
            costs.iter().position(|cost| *cost <= least)
        } else {
            self.draw(&costs, |cost| f64::from(u8::from(cost <= least)))
        };
        self.costs = costs;
        let index = index.expect("the cheapest is one of them");
        Choice {
            index,
            reason: Reason::Cheapest {
                terms: terms(weights, &candidates[index], prompt),
                equals,
                of,
            },
        }
    }

    /// Draws one, each as likely as its share of the sum.
    fn draw(&mut self, costs: &[f64], share: impl Fn(f64) -> f64) -> Option<usize> {
        let sum: f64 = costs.iter().map(|cost| share(*cost)).sum();
        let mut left = self.random.random_range(0.0..1.0) * sum;
        let mut last = None;
        for (index, cost) in costs.iter().enumerate() {
            let share = share(*cost);
            if share > 0.0 {
                last = Some(index);
                if left < share {
                    break;
                }
                left -= share;
            }
        }
        last
    }
}

/// Returns what a prompt of `prompt` tokens costs on a candidate.
pub fn terms(weights: &Weights, candidate: &Candidate<'_>, prompt: u64) -> Terms {
    Terms::new(
        weights,
        prompt,
        candidate.cached,
        &candidate.load,
        candidate.room,
    )
}

/// Returns the least loaded candidate; of several, the first at or after `turn` modulo the length.
fn least_loaded(candidates: &[Candidate<'_>], measure: Measure, turn: usize) -> Choice {
    let key = |load: &Load| {
        let tokens = load.prefill_tokens + load.decode_tokens;
        match measure {
            Measure::Requests => (load.requests, tokens),
            Measure::Tokens => (tokens, load.requests),
        }
    };
    let of = candidates.len();
    let start = turn % of;
    let mut best = start;
    let mut equals = 1;
    for index in (start + 1..of).chain(0..start) {
        match key(&candidates[index].load).cmp(&key(&candidates[best].load)) {
            std::cmp::Ordering::Less => (best, equals) = (index, 1),
            std::cmp::Ordering::Equal => equals += 1,
            std::cmp::Ordering::Greater => {}
        }
    }
    let load = candidates[best].load;
    Choice {
        index: best,
        reason: Reason::LeastLoaded { load, equals, of },
    }
}

#[cfg(test)]
mod tests;
