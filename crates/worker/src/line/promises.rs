//! What processors said that they send, and what of it has come: the tokens that a prompt is to cost here.
//!
//! A processor knows what of a prompt is cached; the prompt itself does not say. The word of a processor and its prompt
//! come by different ways, and either may be first.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long a prompt may be on its way. One that does not come was given up at that moment, or its processor is gone.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Prompts that came of late and were not promised, at most: their promise may yet come.
const MOST_STRANGERS: usize = 256;

/// The tokens that a request has to compute, as far as is known.
pub(crate) type Work = Arc<AtomicU64>;

/// Promises of prompts.
#[derive(Default)]
pub(crate) struct Promises {
    inner: Mutex<Inner>,
    /// Whether there ever was one: most workers never hear of any.
    any: AtomicBool,
}

#[derive(Default)]
struct Inner {
    /// By id of the request.
    expected: HashMap<String, Promise>,
    /// The latest last.
    strangers: VecDeque<(String, Work, Instant)>,
}

struct Promise {
    rank: u32,
    tokens: u64,
    until: Instant,
}

/// What is on its way to a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OnItsWay {
    pub(crate) requests: u64,
    pub(crate) tokens: u64,
}

impl Promises {
    /// Notes that a prompt was promised to a rank.
    pub(crate) fn promised(&self, request: String, rank: u32, tokens: u64) {
        self.any.store(true, Ordering::Relaxed);
        let mut inner = self.inner.lock();
        let now = Instant::now();
        let strangers = &mut inner.strangers;
        if let Some(at) = strangers.iter().position(|(id, ..)| *id == request) {
            if let Some((_, work, _)) = strangers.remove(at) {
                work.store(tokens, Ordering::Relaxed);
            }
            return;
        }
        let promise = Promise {
            rank,
            tokens,
            until: now + ON_ITS_WAY,
        };
        inner.expected.insert(request, promise);
    }

    /// Notes that a request has come, and returns what it costs.
    pub(crate) fn came(&self, request: &str, prompt_tokens: u64) -> Work {
        if !self.any.load(Ordering::Relaxed) {
            return Arc::new(AtomicU64::new(prompt_tokens));
        }
        let mut inner = self.inner.lock();
        if let Some(promise) = inner.expected.remove(request) {
            return Arc::new(AtomicU64::new(promise.tokens));
        }
        let work = Arc::new(AtomicU64::new(prompt_tokens));
        let now = Instant::now();
        let strangers = &mut inner.strangers;
        let is_old = |since: Instant| now.duration_since(since) > ON_ITS_WAY;
        while strangers.len() >= MOST_STRANGERS
            || strangers.front().is_some_and(|(.., since)| is_old(*since))
        {
            strangers.pop_front();
        }
        strangers.push_back((request.to_owned(), work.clone(), now));
        work
    }

    /// Returns what is still to come to a rank.
    pub(crate) fn to(&self, rank: u32) -> OnItsWay {
        let mut inner = self.inner.lock();
        let now = Instant::now();
        inner.expected.retain(|_, promise| now < promise.until);
        let to_rank = inner.expected.values().filter(|one| one.rank == rank);
        to_rank.fold(OnItsWay::default(), |sum, one| OnItsWay {
            requests: sum.requests + 1,
            tokens: sum.tokens.saturating_add(one.tokens),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(work: &Work) -> u64 {
        work.load(Ordering::Relaxed)
    }

    #[tokio::test(start_paused = true)]
    async fn a_promise_counts_until_its_prompt_comes_or_is_late() {
        let promises = Promises::default();
        promises.promised("a".to_owned(), 1, 30);
        promises.promised("b".to_owned(), 1, 20);
        let both = OnItsWay {
            requests: 2,
            tokens: 50,
        };
        assert_eq!(promises.to(1), both);
        assert_eq!(promises.to(0), OnItsWay::default());
        assert_eq!(tokens(&promises.came("a", 100)), 30);
        assert_eq!(promises.to(1).tokens, 20);
        tokio::time::advance(ON_ITS_WAY * 2).await;
        assert_eq!(promises.to(1), OnItsWay::default());
    }

    #[test]
    fn what_a_processor_says_too_much_is_a_lot_and_no_more() {
        let promises = Promises::default();
        promises.promised("a".to_owned(), 0, u64::MAX);
        promises.promised("b".to_owned(), 0, u64::MAX);
        assert_eq!(promises.to(0).tokens, u64::MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_promise_that_comes_after_its_prompt_says_what_that_costs() {
        let promises = Promises::default();
        promises.promised("before".to_owned(), 1, 0);
        let work = promises.came("a", 100);
        assert_eq!(tokens(&work), 100);
        promises.promised("a".to_owned(), 0, 30);
        assert_eq!(tokens(&work), 30);
        assert_eq!(promises.to(0), OnItsWay::default());
    }
}
