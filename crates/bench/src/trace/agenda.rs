//! What is going to happen, in the order in which it will.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Events in simulated time.
#[derive(Debug)]
pub(super) struct Agenda<T> {
    events: BinaryHeap<Reverse<Event<T>>>,
    noted: u64,
}

#[derive(Debug)]
struct Event<T> {
    at: f64,
    /// Of two at a time the one that was noted first.
    nth: u64,
    what: T,
}

impl<T> Agenda<T> {
    pub(super) fn new() -> Self {
        Self {
            events: BinaryHeap::new(),
            noted: 0,
        }
    }

    /// Notes what happens at a time, in seconds.
    pub(super) fn note(&mut self, at: f64, what: T) {
        self.noted += 1;
        let nth = self.noted;
        self.events.push(Reverse(Event { at, nth, what }));
    }

    /// Returns what happens next, and when.
    pub(super) fn next(&mut self) -> Option<(f64, T)> {
        let Reverse(event) = self.events.pop()?;
        Some((event.at, event.what))
    }
}

impl<T> Ord for Event<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.nth.cmp(&other.nth))
    }
}

impl<T> PartialOrd for Event<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Event<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Event<T> {}
