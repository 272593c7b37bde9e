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
    /// Prompt tokens of requests that have not answered yet: prefill work to do.
    pub prefill_tokens: u64,
    /// Tokens, prompt and generated, of requests that are generating: KV that decoding reads.
    pub decode_tokens: u64,
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
}

impl Ledger {
    /// Returns what is booked now.
    ///
    /// The three numbers are read one after the other; a request that moves on in between may be counted
    /// in two or none of the token sums, which the next reading puts right.
    pub fn load(&self) -> Load {
        Load {
            requests: self.counters.requests.load(Ordering::Relaxed),
            prefill_tokens: self.counters.prefill_tokens.load(Ordering::Relaxed),
            decode_tokens: self.counters.decode_tokens.load(Ordering::Relaxed),
        }
    }

    /// Books a request of `prompt_tokens` tokens to prefill.
    pub fn book(&self, prompt_tokens: usize) -> Booking {
        let tokens = prompt_tokens as u64;
        self.counters
            .prefill_tokens
            .fetch_add(tokens, Ordering::Relaxed);
        self.booking(tokens, false)
    }

    /// Books a request whose prompt is computed elsewhere: its tokens are KV to hold, not work to do.
    pub fn book_decode(&self, prompt_tokens: usize) -> Booking {
        let tokens = prompt_tokens as u64;
        self.counters
            .decode_tokens
            .fetch_add(tokens, Ordering::Relaxed);
        self.booking(tokens, true)
    }

    fn booking(&self, tokens: u64, decoding: bool) -> Booking {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        Booking {
            counters: Arc::clone(&self.counters),
            tokens,
            decoding,
        }
    }
}

/// One request's share of a [`Ledger`]. Dropping it takes the share back.
#[derive(Debug)]
pub struct Booking {
    counters: Arc<Counters>,
    tokens: u64,
    decoding: bool,
}

impl Booking {
    /// Records `count` generated tokens. The first call says that the prefill is done.
    pub fn generated(&mut self, count: usize) {
        let count = count as u64;
        let mut grown = count;
        if !self.decoding {
            self.decoding = true;
            self.counters
                .prefill_tokens
                .fetch_sub(self.tokens, Ordering::Relaxed);
            grown += self.tokens;
        }
        self.tokens += count;
        self.counters
            .decode_tokens
            .fetch_add(grown, Ordering::Relaxed);
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let tokens = if self.decoding {
            &self.counters.decode_tokens
        } else {
            &self.counters.prefill_tokens
        };
        tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.counters.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_is_computed_elsewhere_is_no_prefill_work() {
        let ledger = Ledger::default();
        let mut booking = ledger.book_decode(100);
        booking.generated(2);
        let booked = ledger.load();
        assert_eq!((booked.prefill_tokens, booked.decode_tokens), (0, 102));
        drop(booking);
        assert_eq!(ledger.load(), Load::default());
    }

    #[test]
    fn a_booking_moves_from_prefill_to_decode_and_takes_itself_back() {
        let ledger = Ledger::default();
        let mut first = ledger.book(100);
        let second = ledger.book(7);
        assert_eq!(
            ledger.load(),
            Load {
                requests: 2,
                prefill_tokens: 107,
                decode_tokens: 0
            }
        );

        first.generated(1);
        first.generated(3);
        assert_eq!(
            ledger.load(),
            Load {
                requests: 2,
                prefill_tokens: 7,
                decode_tokens: 104
            }
        );

        drop(second);
        drop(first);
        assert_eq!(ledger.load(), Load::default());
    }
}
