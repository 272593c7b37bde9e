//! Which target a session used last: whoever comes again finds what it left there, known or not.
//!
//! Bounded in time and number without a list: two maps, of which the older one is dropped as a whole. So an
//! entry is remembered between one and two halves of what is said.

use std::collections::HashMap;
use std::time::Duration;

/// Sessions remembered at most (as in Dynamo 1.6).
const MOST: usize = 65_536;

/// Where each session was last, by the hash of its name.
#[derive(Debug)]
pub struct Sessions<T> {
    half: Duration,
    since: Duration,
    new: HashMap<u64, T>,
    old: HashMap<u64, T>,
}

impl<T: Clone> Sessions<T> {
    /// Returns an empty memory.
    ///
    /// - `ttl`: how long a session is remembered after its last request, or half of that. Zero: not at all.
    pub fn new(ttl: Duration) -> Self {
        Self {
            half: ttl / 2,
            since: Duration::ZERO,
            new: HashMap::new(),
            old: HashMap::new(),
        }
    }

    /// Returns where a session was last.
    ///
    /// - `now`: since any fixed moment, the same for all calls.
    pub fn last(&mut self, session: u64, now: Duration) -> Option<&T> {
        self.turn(now);
        self.new.get(&session).or_else(|| self.old.get(&session))
    }

    /// Notes where a session is.
    pub fn note(&mut self, session: u64, at: T, now: Duration) {
        if self.half.is_zero() {
            return;
        }
        self.turn(now);
        self.old.remove(&session);
        self.new.insert(session, at);
        if self.new.len() > MOST / 2 {
            self.age(now);
        }
    }

    fn turn(&mut self, now: Duration) {
        for _ in 0..2 {
            if now.saturating_sub(self.since) >= self.half
                && !(self.new.is_empty() && self.old.is_empty())
            {
                let since = self.since + self.half;
                self.age(since);
            }
        }
        if self.new.is_empty() && self.old.is_empty() {
            self.since = now;
        }
    }

    fn age(&mut self, since: Duration) {
        self.old = std::mem::take(&mut self.new);
        self.since = since;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_session_is_remembered_for_its_time_after_its_last_request() {
        let mut sessions = Sessions::new(at(100));
        sessions.note(1, 'a', at(1000));
        sessions.note(2, 'b', at(1040));
        assert_eq!(sessions.last(1, at(1049)), Some(&'a'));
        sessions.note(1, 'c', at(1060));
        assert_eq!(sessions.last(1, at(1099)), Some(&'c'));
        assert_eq!(sessions.last(2, at(1099)), Some(&'b'));
        assert_eq!(sessions.last(2, at(1140)), None);
        assert_eq!(sessions.last(1, at(1300)), None);
    }

    #[test]
    fn as_many_are_remembered_as_is_said_and_none_without_time() {
        let mut sessions = Sessions::new(at(100));
        for session in 0..200_000 {
            sessions.note(session, (), at(1));
        }
        assert!(sessions.new.len() + sessions.old.len() <= MOST);
        assert!(sessions.last(199_999, at(1)).is_some());
        let mut none = Sessions::new(at(0));
        none.note(1, (), at(1));
        assert_eq!(none.last(1, at(1)), None);
    }
}
