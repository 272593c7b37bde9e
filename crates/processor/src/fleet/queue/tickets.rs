//! The book of tickets: which prompt of a queue stands in the shared line by which ticket, and since when.
//!
//! What is done about them is not decided here (`line`).

use std::collections::HashMap;
use std::time::Duration;

use stator_common::WorkerId;
use stator_router::backlog::Place;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

/// No ticket.
pub(super) const NONE: u64 = 0;

/// A ticket to be put into the line.
pub(super) struct Put {
    pub(super) number: u64,
    /// Who is to have it first, and for how long.
    pub(super) first: Option<(WorkerId, Duration)>,
}

/// Which prompts are in line. Locked after the backlog, if both are.
#[derive(Default)]
pub(super) struct Tickets {
    given: HashMap<u64, Given>,
    last: u64,
    /// Since when workers have had nothing to do, and did not ask for anybody who is in line.
    pub(super) idle: HashMap<WorkerId, Instant>,
    /// Takes tickets to the line while that is open.
    clerk: Option<UnboundedSender<Put>>,
}

/// A ticket in the line.
struct Given {
    /// Who waits by it.
    place: Place,
    /// When it was put in, whoever waited by it then.
    since: Instant,
}

impl Tickets {
    /// Lets prompts enter.
    pub(super) fn open(&mut self, clerk: UnboundedSender<Put>) {
        self.clerk = Some(clerk);
    }

    /// Forgets all tickets, and lets nobody enter.
    pub(super) fn close(&mut self) {
        self.clerk = None;
        self.given.clear();
        self.idle.clear();
    }

    /// Says whether prompts may enter.
    pub(super) fn is_open(&self) -> bool {
        self.clerk.is_some()
    }

    /// Says whether nobody is in line.
    pub(super) fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// Gives a prompt a ticket, if prompts may enter.
    pub(super) fn enter(&mut self, place: Place, first: Option<(WorkerId, Duration)>) -> u64 {
        let Some(clerk) = &self.clerk else {
            return NONE;
        };
        let number = self.last + 1;
        if clerk.send(Put { number, first }).is_err() {
            return NONE;
        }
        self.last = number;
        let since = Instant::now();
        self.given.insert(number, Given { place, since });
        number
    }

    /// Puts a ticket in once more, for anybody, if somebody still waits by it.
    pub(super) fn let_anybody(&self, number: u64) {
        if self.waits(number)
            && let Some(clerk) = &self.clerk
        {
            let first = None;
            // If it is not put in, the line is being closed.
            drop(clerk.send(Put { number, first }));
        }
    }

    /// Returns the number of the latest ticket.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Says whether somebody waits by a ticket.
    pub(super) fn waits(&self, number: u64) -> bool {
        self.given.contains_key(&number)
    }

    /// Says whether somebody waits by a ticket of then or before.
    ///
    /// - `then`: the latest ticket at that time.
    pub(super) fn waits_since(&self, then: u64) -> bool {
        self.given.keys().any(|number| *number <= then)
    }

    /// Returns who waits by a ticket.
    pub(super) fn place(&self, number: u64) -> Option<Place> {
        self.given.get(&number).map(|given| given.place)
    }

    /// Forgets a ticket, and returns who waited by it.
    pub(super) fn forget(&mut self, number: u64) -> Option<Place> {
        self.given.remove(&number).map(|given| given.place)
    }

    /// Forgets a ticket that was used for somebody, and returns who waits by that one's own ticket from now on: who waited
    /// by the one that was used, if these are two.
    ///
    /// - `still_waits`: who does not gets no ticket.
    pub(super) fn pass_on(
        &mut self,
        used: u64,
        own: u64,
        still_waits: impl FnOnce(Place) -> bool,
    ) -> Option<Place> {
        let passed = self.given.remove(&own);
        let place = self.forget(used).filter(|place| still_waits(*place))?;
        let since = passed?.since;
        self.given.insert(own, Given { place, since });
        Some(place)
    }

    /// Returns those that were put in so long ago.
    pub(super) fn older(&self, age: Duration, now: Instant) -> Vec<u64> {
        let given = self.given.iter();
        let old = given.filter(|(_, given)| now.duration_since(given.since) >= age);
        old.map(|(number, _)| *number).collect()
    }
}
