//! What is booked on a target: counted by the one who decides, at the moment of the decision.
//!
//! A worker's own report of its load is always older than the decisions made since; several requests
//! that arrive together would all go to the same idle worker. So the router counts what it sent itself,
//! and a [`Booking`] takes its share back when it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is booked on one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests sent and not finished.
    pub requests: u64,
    /// Prompt tokens, without those expected in a cache, of requests that have not answered yet: prefill work to do.
    pub prefill_tokens: u64,
    /// Tokens, prompt and generated, of requests that are generating: KV that decoding reads.
    pub decode_tokens: u64,
    /// Tokens that unfinished requests brought or generated themselves, without those expected in a cache: KV that
    /// is no other request's as well.
    pub kv_tokens: u64,
    /// Requests that are generating: a prompt that is computed beside them holds each of them up.
    pub generating: u64,
    /// Prompts that wait or are computed: requests that have not answered yet, and not all of whose prompt is expected in
    /// a cache.
    pub prompts: u64,
}

impl std::ops::Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            prefill_tokens: self.prefill_tokens.saturating_add(other.prefill_tokens),
            decode_tokens: self.decode_tokens.saturating_add(other.decode_tokens),
            kv_tokens: self.kv_tokens.saturating_add(other.kv_tokens),
            generating: self.generating.saturating_add(other.generating),
            prompts: self.prompts.saturating_add(other.prompts),
        }
    }
}

/// What a request brings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Tokens of its prompt.
    pub prompt: u64,
    /// Of these, tokens that the target is expected to have in its cache; not more than there are.
    pub cached: u64,
    /// Whether the prompt is computed elsewhere: then it is KV to hold, not work to do.
    pub prefilled: bool,
}

/// The books of one target, shared by the decisions and by the requests that run on it.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    prefill_tokens: AtomicU64,
    decode_tokens: AtomicU64,
    kv_tokens: AtomicU64,
    generating: AtomicU64,
    prompts: AtomicU64,
}

impl Counters {
    /// Adds a prompt of which so many tokens are to be computed.
    fn computes(&self, uncached: u64) {
        self.prefill_tokens.fetch_add(uncached, Ordering::Relaxed);
        self.prompts
            .fetch_add(u64::from(uncached > 0), Ordering::Relaxed);
    }

    /// Takes back what [`Counters::computes`] added.
    fn computed(&self, uncached: u64) {
        self.prefill_tokens.fetch_sub(uncached, Ordering::Relaxed);
        self.prompts
            .fetch_sub(u64::from(uncached > 0), Ordering::Relaxed);
    }

    fn load(&self) -> Load {
        Load {
            requests: self.requests.load(Ordering::Relaxed),
            prefill_tokens: self.prefill_tokens.load(Ordering::Relaxed),
            decode_tokens: self.decode_tokens.load(Ordering::Relaxed),
            kv_tokens: self.kv_tokens.load(Ordering::Relaxed),
            generating: self.generating.load(Ordering::Relaxed),
            prompts: self.prompts.load(Ordering::Relaxed),
        }
    }
}

/// What others said that they have booked on a target: written now and then, read by every decision.
#[derive(Debug, Default)]
pub struct Told {
    counters: Counters,
}

impl Told {
    /// Replaces what was said before.
    pub fn set(&self, load: Load) {
        let Counters {
            requests,
            prefill_tokens,
            decode_tokens,
            kv_tokens,
            generating,
            prompts,
        } = &self.counters;
        requests.store(load.requests, Ordering::Relaxed);
        prefill_tokens.store(load.prefill_tokens, Ordering::Relaxed);
        decode_tokens.store(load.decode_tokens, Ordering::Relaxed);
        kv_tokens.store(load.kv_tokens, Ordering::Relaxed);
        generating.store(load.generating, Ordering::Relaxed);
        prompts.store(load.prompts, Ordering::Relaxed);
    }

    /// Returns what was said last; the numbers are read one after the other.
    pub fn load(&self) -> Load {
        self.counters.load()
    }
}

impl Ledger {
    /// Returns what is booked now.
    ///
    /// The numbers are read one after the other; a request that moves on in between may be counted
    /// in two or none of the sums, which the next reading puts right.
    pub fn load(&self) -> Load {
        self.counters.load()
    }

    /// Books a request.
    pub fn book(&self, share: Share) -> Booking {
        let counters = &self.counters;
        let own = share.prompt.saturating_sub(share.cached);
        let stage = if share.prefilled {
            counters
                .decode_tokens
                .fetch_add(share.prompt, Ordering::Relaxed);
            Stage::Decode(share.prompt)
        } else {
            counters.computes(own);
            Stage::Prefill {
                uncached: own,
                prompt: share.prompt,
            }
        };
        counters.kv_tokens.fetch_add(own, Ordering::Relaxed);
        counters.requests.fetch_add(1, Ordering::Relaxed);
        Booking {
            counters: Arc::clone(counters),
            stage,
            own,
            generates: false,
        }
    }
}

/// One request's share of a [`Ledger`]. Dropping it takes the share back.
#[derive(Debug)]
pub struct Booking {
    counters: Arc<Counters>,
    stage: Stage,
    /// Of `kv_tokens`.
    own: u64,
    /// Counted as generating.
    generates: bool,
}

/// What of a request is booked as tokens.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Prefill { uncached: u64, prompt: u64 },
    Decode(u64),
}

impl Booking {
    /// Records `count` generated tokens. The first call says that the prefill is done.
    pub fn generated(&mut self, count: usize) {
        let count = count as u64;
        if !self.generates {
            self.generates = true;
            self.counters.generating.fetch_add(1, Ordering::Relaxed);
        }
        let (tokens, grown) = match self.stage {
            Stage::Decode(tokens) => (tokens + count, count),
            Stage::Prefill { uncached, prompt } => {
                self.counters.computed(uncached);
                (prompt + count, prompt + count)
            }
        };
        self.stage = Stage::Decode(tokens);
        self.own += count;
        self.counters
            .decode_tokens
            .fetch_add(grown, Ordering::Relaxed);
        self.counters.kv_tokens.fetch_add(count, Ordering::Relaxed);
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        match self.stage {
            Stage::Prefill { uncached, .. } => {
                self.counters.computed(uncached);
            }
            Stage::Decode(tokens) => {
                self.counters
                    .decode_tokens
                    .fetch_sub(tokens, Ordering::Relaxed);
            }
        }
        self.counters
            .kv_tokens
            .fetch_sub(self.own, Ordering::Relaxed);
        self.counters.requests.fetch_sub(1, Ordering::Relaxed);
        if self.generates {
            self.counters.generating.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// - `requests`: all, those that generate, and those whose prompts are to be computed.
    fn load(
        (requests, generating, prompts): (u64, u64, u64),
        prefill_tokens: u64,
        decode_tokens: u64,
        kv_tokens: u64,
    ) -> Load {
        Load {
            requests,
            prefill_tokens,
            decode_tokens,
            kv_tokens,
            generating,
            prompts,
        }
    }

    #[test]
    fn a_prompt_that_is_computed_elsewhere_is_no_prefill_work() {
        let ledger = Ledger::default();
        let mut booking = ledger.book(Share {
            prompt: 100,
            cached: 30,
            prefilled: true,
        });
        booking.generated(2);
        assert_eq!(ledger.load(), load((1, 1, 0), 0, 102, 72));
        drop(booking);
        assert_eq!(ledger.load(), Load::default());
    }

    #[test]
    fn only_what_is_not_cached_is_prefill_work_and_all_of_it_is_decoded_from() {
        let ledger = Ledger::default();
        let share = |prompt, cached| Share {
            prompt,
            cached,
            prefilled: false,
        };
        let mut first = ledger.book(share(100, 60));
        let second = ledger.book(share(7, 0));
        assert_eq!(ledger.load(), load((2, 0, 2), 47, 0, 47));

        first.generated(1);
        first.generated(3);
        assert_eq!(ledger.load(), load((2, 1, 1), 7, 104, 51));

        // One whose prompt is there, or will be before it is its turn.
        let follower = ledger.book(share(7, 7));
        assert_eq!(ledger.load(), load((3, 1, 1), 7, 104, 51));

        drop(second);
        assert_eq!(ledger.load(), load((2, 1, 0), 0, 104, 44));
        drop(follower);
        drop(first);
        assert_eq!(ledger.load(), Load::default());
    }
}
