//! The policies and their decision.

use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stator_common::ids::WorkerId;

use crate::load::Load;
use crate::prompt::Prompt;

/// How a target is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// One after the other.
    #[default]
    RoundRobin,
    /// Each with the same probability.
    Random,
    /// The one with the least booked on it; among equals, one after the other.
    LeastLoaded(Measure),
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
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index into the candidates that were given.
    pub index: usize,
    /// Why that one.
    pub reason: Reason,
}

/// Why a candidate was chosen, with the values that decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// A policy with the little state that it keeps between decisions.
#[derive(Debug)]
pub struct Router {
    policy: Policy,
    /// Decisions made; turns are taken from it.
    turn: usize,
    random: StdRng,
}

impl Router {
    /// Returns a router. Equal seeds and equal questions give equal answers.
    pub fn new(policy: Policy, seed: u64) -> Self {
        Self {
            policy,
            turn: 0,
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Returns the policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Chooses one of `candidates` for `prompt`.
    ///
    /// The policies that exist today do not look at the prompt, so its tokens are not asked for.
    ///
    /// # Errors
    /// [`NoCandidates`].
    pub fn choose(
        &mut self,
        candidates: &[Candidate<'_>],
        _prompt: &dyn Prompt,
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
        Ok(match self.policy {
            Policy::RoundRobin => Choice {
                index: turn % of,
                reason: Reason::Turn { of },
            },
            Policy::Random => Choice {
                index: self.random.random_range(0..of),
                reason: Reason::Drawn { of },
            },
            Policy::LeastLoaded(measure) => least_loaded(candidates, measure, turn),
        })
    }
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
    use crate::{Ledger, TokenPrompt};

    const PROMPT: TokenPrompt<'static> = TokenPrompt {
        tokens: &[1, 2, 3],
        lora: "",
        cache_salt: "",
    };

    fn ids(n: usize) -> Vec<WorkerId> {
        (0..n).map(|i| WorkerId(format!("w{i}"))).collect()
    }

    fn candidates<'a>(ids: &'a [WorkerId], ledgers: &[Ledger]) -> Vec<Candidate<'a>> {
        let loads = ledgers.iter().map(Ledger::load);
        ids.iter()
            .zip(loads)
            .map(|(worker, load)| Candidate {
                worker,
                dp_rank: None,
                load,
            })
            .collect()
    }

    fn idle(ids: &[WorkerId]) -> Vec<Candidate<'_>> {
        candidates(ids, &vec![Ledger::default(); ids.len()])
    }

    #[test]
    fn no_candidate_is_an_error_that_another_time_may_cure() {
        let error = Router::new(Policy::RoundRobin, 0)
            .choose(&[], &PROMPT)
            .unwrap_err();
        assert!(error.code().is_retryable());
    }

    #[test]
    fn round_robin_takes_turns() {
        let ids = ids(3);
        let mut router = Router::new(Policy::RoundRobin, 0);
        let seen: Vec<_> = (0..7)
            .map(|_| router.choose(&idle(&ids), &PROMPT).unwrap().index)
            .collect();
        assert_eq!(seen, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn random_draws_are_spread_and_follow_their_seed() {
        let ids = ids(4);
        let draw = |seed| {
            let mut router = Router::new(Policy::Random, seed);
            (0..400)
                .map(|_| router.choose(&idle(&ids), &PROMPT).unwrap().index)
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
            let choice = router.choose(&candidates(&ids, &ledgers), &PROMPT).unwrap();
            running.push(ledgers[choice.index].book(3));
        }
        assert!(ledgers.iter().all(|l| l.load().requests == 3));

        // The first, fourth and seventh went to one target; when they end, it is the least loaded.
        let mut nth = 0;
        running.retain(|_| {
            nth += 1;
            nth % 3 != 1
        });
        let choice = router.choose(&candidates(&ids, &ledgers), &PROMPT).unwrap();
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
        let _long = ledgers[0].book(10_000);
        let _short = [ledgers[1].book(10), ledgers[1].book(10)];
        let choose = |measure| {
            Router::new(Policy::LeastLoaded(measure), 0)
                .choose(&candidates(&ids, &ledgers), &PROMPT)
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
            .map(|_| router.choose(&idle(&ids), &PROMPT).unwrap().index)
            .collect();
        assert_eq!(seen, [0, 1, 2, 0, 1, 2]);
    }
}
