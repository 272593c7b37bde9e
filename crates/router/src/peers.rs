//! What other processors say that they have booked, beside what this one has.
//!
//! Each says all of it every time, so the latest word counts and none is missed for long. What a processor said is
//! forgotten when it was not heard of for [`PATIENCE`]: its requests end with it, or it will say so again. Nothing here
//! is needed for an answer; a load that is unknown costs balance.

use std::collections::HashMap;
use std::time::Duration;

use stator_common::WorkerId;

use crate::load::Load;

/// How long what a processor said counts. Heartbeats come three times as often, so that one may be lost.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// What is booked on the ranks of each worker.
type Loads = HashMap<WorkerId, Vec<(u32, Load)>>;

/// The latest words of other processors.
#[derive(Debug, Default)]
pub struct Peers {
    by_name: HashMap<String, Said>,
}

#[derive(Debug)]
struct Said {
    seq: u64,
    at: Duration,
    loads: Loads,
}

impl Peers {
    /// Takes in what a processor says; what is older than its last word is left out.
    ///
    /// - `name`: of the processor, another one in each of its lives.
    /// - `seq`: number of the message, growing.
    /// - `now`: since any fixed moment, the same for all calls.
    pub fn heard(
        &mut self,
        name: &str,
        seq: u64,
        loads: impl IntoIterator<Item = (WorkerId, u32, Load)>,
        now: Duration,
    ) {
        if let Some(known) = self.by_name.get(name)
            && known.seq >= seq
        {
            return;
        }
        let mut by_worker = Loads::new();
        for (worker, rank, load) in loads {
            by_worker.entry(worker).or_default().push((rank, load));
        }
        let said = Said {
            seq,
            at: now,
            loads: by_worker,
        };
        self.by_name.insert(name.to_owned(), said);
    }

    /// Forgets a processor that left.
    pub fn gone(&mut self, name: &str) {
        self.by_name.remove(name);
    }

    /// Forgets those that were not heard of for too long.
    pub fn expire(&mut self, now: Duration) {
        self.by_name
            .retain(|_, said| now.saturating_sub(said.at) < PATIENCE);
    }

    /// Returns what all of them have booked on a rank of a worker.
    pub fn load(&self, worker: &WorkerId, rank: u32) -> Load {
        let said = self.by_name.values();
        let ranks = said.filter_map(|said| said.loads.get(worker)).flatten();
        let loads = ranks.filter(|(of, _)| *of == rank).map(|(_, load)| *load);
        loads.fold(Load::default(), |sum, load| sum + load)
    }

    /// Returns how many are heard.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Says whether none is heard.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(requests: u64) -> Load {
        Load {
            requests,
            prefill_tokens: 10 * requests,
            ..Load::default()
        }
    }

    fn worker() -> WorkerId {
        WorkerId("w".to_owned())
    }

    #[test]
    fn sums_are_per_rank_and_end_with_their_processor() {
        let at = Duration::from_secs;
        let mut peers = Peers::default();
        let of = |rank, requests| (worker(), rank, load(requests));
        peers.heard("a", 1, [of(0, 1), of(1, 2)], at(0));
        peers.heard("b", 9, [of(0, 4)], at(2));
        assert_eq!(peers.load(&worker(), 0), load(5));
        assert_eq!(peers.load(&worker(), 1), load(2));
        // What is said later replaces all of what was said.
        peers.heard("b", 10, [of(1, 4)], at(2));
        assert_eq!(peers.load(&worker(), 0), load(1));
        peers.expire(at(3));
        assert_eq!((peers.len(), peers.load(&worker(), 1)), (1, load(4)));
        peers.gone("b");
        assert!(peers.is_empty());
    }

    proptest! {
        /// Whatever order messages come in, each processor's newest counts, if it is new enough.
        #[test]
        fn the_newest_word_of_each_counts(
            said in prop::collection::vec((0_usize..3, 1_u64..20, 0_u64..100, 0_u64..1500), 0..60)
        ) {
            let mut peers = Peers::default();
            let mut newest: HashMap<usize, (u64, u64, Duration)> = HashMap::new();
            let mut now = Duration::ZERO;
            for (name, seq, requests, later) in said {
                now += Duration::from_millis(later);
                peers.expire(now);
                newest.retain(|_, (_, _, at)| now - *at < PATIENCE);
                peers.heard(&name.to_string(), seq, [(worker(), 0, load(requests))], now);
                if newest.get(&name).is_none_or(|(known, ..)| *known < seq) {
                    newest.insert(name, (seq, requests, now));
                }
                let sum = newest.values().map(|(_, requests, _)| requests).sum();
                prop_assert_eq!(peers.load(&worker(), 0), load(sum));
                prop_assert_eq!(peers.len(), newest.len());
            }
        }
    }
}
