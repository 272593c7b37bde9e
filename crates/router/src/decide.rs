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
mod tests {
    use super::*;
    use crate::{Ledger, Share};

    const PROMPT: u64 = 3;

    fn share(prompt: u64) -> Share {
        Share {
            prompt,
            ..Share::default()
        }
    }

    fn ids(n: usize) -> Vec<WorkerId> {
        (0..n).map(|i| WorkerId(format!("w{i}"))).collect()
    }

    fn candidates<'a>(ids: &'a [WorkerId], ledgers: &[Ledger]) -> Vec<Candidate<'a>> {
        let loads = ledgers.iter().map(Ledger::load);
        ids.iter()
            .zip(loads)
            .map(|(worker, load)| Candidate::new(worker, None, load))
            .collect()
    }

    fn idle(ids: &[WorkerId]) -> Vec<Candidate<'_>> {
        candidates(ids, &vec![Ledger::default(); ids.len()])
    }

    #[test]
    fn no_candidate_is_an_error_that_another_time_may_cure() {
        let error = Router::new(Policy::RoundRobin, 0)
            .choose(&[], PROMPT)
            .unwrap_err();
        assert!(error.code().is_retryable());
    }

    #[test]
    fn round_robin_takes_turns() {
        let ids = ids(3);
        let mut router = Router::new(Policy::RoundRobin, 0);
        let seen: Vec<_> = (0..7)
            .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
            .collect();
        assert_eq!(seen, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn random_draws_are_spread_and_follow_their_seed() {
        let ids = ids(4);
        let draw = |seed| {
            let mut router = Router::new(Policy::Random, seed);
            (0..400)
                .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        for index in 0..4 {
            let count = draw(7).into_iter().filter(|i| *i == index).count();
            assert!(
                (60..=140).contains(&count),
                "{index} was drawn {count} times"
            );
        }
    }

    #[test]
    fn requests_that_arrive_together_are_spread_by_what_was_booked() {
        let ids = ids(3);
        let ledgers: Vec<Ledger> = (0..3).map(|_| Ledger::default()).collect();
        let mut router = Router::new(Policy::LeastLoaded(Measure::Requests), 0);
        let mut running = Vec::new();
        for _ in 0..9 {
            let choice = router.choose(&candidates(&ids, &ledgers), PROMPT).unwrap();
            running.push(ledgers[choice.index].book(share(3)));
        }
        assert!(ledgers.iter().all(|l| l.load().requests == 3));

        // The first, fourth and seventh went to one target; when they end, it is the least loaded.
        let mut nth = 0;
        running.retain(|_| {
            nth += 1;
            nth % 3 != 1
        });
        let choice = router.choose(&candidates(&ids, &ledgers), PROMPT).unwrap();
        assert_eq!(ledgers[choice.index].load().requests, 0);
        let Reason::LeastLoaded {
            equals: 1, of: 3, ..
        } = choice.reason
        else {
            panic!("{:?}", choice.reason)
        };
    }

    #[test]
    fn tokens_may_outweigh_requests() {
        let ids = ids(2);
        let ledgers = [Ledger::default(), Ledger::default()];
        let _long = ledgers[0].book(share(10_000));
        let _short = [ledgers[1].book(share(10)), ledgers[1].book(share(10))];
        let choose = |measure| {
            Router::new(Policy::LeastLoaded(measure), 0)
                .choose(&candidates(&ids, &ledgers), PROMPT)
                .unwrap()
                .index
        };
        assert_eq!(choose(Measure::Requests), 0);
        assert_eq!(choose(Measure::Tokens), 1);
    }

    #[test]
    fn equally_idle_targets_take_turns() {
        let ids = ids(3);
        let mut router = Router::new(Policy::LeastLoaded(Measure::Requests), 0);
        let seen: Vec<_> = (0..6)
            .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
            .collect();
        assert_eq!(seen, [0, 1, 2, 0, 1, 2]);
    }

    fn kv(weights: Weights) -> Router {
        Router::new(Policy::Kv(weights), 3)
    }

    fn with_cache<'a>(ids: &'a [WorkerId], device: &[u64]) -> Vec<Candidate<'a>> {
        let mut candidates = idle(ids);
        for (candidate, &device) in candidates.iter_mut().zip(device) {
            candidate.cached.device = device;
        }
        candidates
    }

    fn queue(candidate: &mut Candidate<'_>, tokens: u64) {
        candidate.load.requests += 1;
        candidate.load.prefill_tokens += tokens;
    }

    #[test]
    fn a_prompt_goes_where_its_prefix_is_until_more_waits_there_than_the_prefix_saves() {
        let ids = ids(3);
        let mut router = kv(Weights::WHOLE);
        let mut candidates = with_cache(&ids, &[0, 800, 640]);
        let choice = router.choose(&candidates, 1000).unwrap();
        assert_eq!(choice.index, 1);
        let Reason::Cheapest {
            terms,
            equals: 1,
            of: 3,
        } = choice.reason
        else {
            panic!("{:?}", choice.reason)
        };
        assert_eq!((terms.uncached, terms.cost), (200, 200.0));

        queue(&mut candidates[1], 161);
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 2);
        queue(&mut candidates[2], 641);
        queue(&mut candidates[1], 640);
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
    }

    #[test]
    fn slower_media_save_less_and_decoding_costs_its_weight() {
        let ids = ids(2);
        let mut candidates = with_cache(&ids, &[500, 0]);
        candidates[1].cached = Cached {
            device: 0,
            host: 500,
            storage: 400,
        };
        let mut router = kv(Weights::WHOLE);
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
        candidates[1].cached.host = 900;
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 1);
        candidates[1].load.decode_tokens = 10_000;
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
        // Where nothing is decoded it does not count.
        assert_eq!(
            kv(Weights::PREFILL)
                .choose(&candidates, 1000)
                .unwrap()
                .index,
            1
        );
    }

    #[test]
    fn a_full_target_is_left_to_others_and_taken_if_all_are_full() {
        let ids = ids(2);
        let mut candidates = with_cache(&ids, &[990, 0]);
        let room = Room {
            requests: 2,
            kv_tokens: 2000,
        };
        candidates
            .iter_mut()
            .for_each(|candidate| candidate.room = room);
        let mut router = kv(Weights::WHOLE);
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
        candidates[0].load.requests = 2;
        assert_eq!(router.choose(&candidates, 1000).unwrap().index, 1);
        candidates[1].load = Load {
            requests: 1,
            kv_tokens: 1001,
            ..Load::default()
        };
        let choice = router.choose(&candidates, 1000).unwrap();
        assert!(matches!(choice.reason, Reason::Cheapest { terms, .. } if terms.full));
        assert_eq!(choice.index, 0);
    }

    #[test]
    fn equals_are_drawn_and_temperature_draws_dearer_ones_the_more_rarely() {
        let ids = ids(4);
        let count = |mut router: Router, device: &[u64]| {
            let mut counts = [0; 4];
            for _ in 0..2000 {
                counts[router
                    .choose(&with_cache(&ids, device), 1000)
                    .unwrap()
                    .index] += 1;
            }
            counts
        };
        let equal = count(kv(Weights::WHOLE), &[500, 500, 100, 500]);
        assert_eq!(equal[2], 0);
        assert!(
            equal.iter().filter(|n| (550..=780).contains(*n)).count() == 3,
            "{equal:?}"
        );

        let warm = Weights {
            temperature: 0.3,
            ..Weights::WHOLE
        };
        let drawn = count(kv(warm), &[1000, 700, 400, 100]);
        // Each costs 300 more than the one before: e times less often.
        for pair in drawn.windows(2) {
            let ratio = f64::from(pair[0]) / f64::from(pair[1]);
            assert!((2.0..=3.7).contains(&ratio), "{drawn:?}");
        }
    }

    #[test]
    fn a_copy_decides_as_the_original_would() {
        let ids = ids(5);
        let mut router = kv(Weights::WHOLE);
        for _ in 0..20 {
            let foretold = router.clone().choose(&idle(&ids), 10).unwrap();
            assert_eq!(router.choose(&idle(&ids), 10).unwrap(), foretold);
        }
    }
}
