//! Prompts that wait until a target has room, and which of them it takes.
//!
//! Late binding: nothing is sent to a target that could not begin it soon, so a prompt that waits goes to whoever is
//! free first, and one that a worker could not finish is not stuck behind it. What caches hold is a preference within
//! bounds: a free target takes, of the first [`WINDOW`] prompts that it may have, the one that it has more of than
//! everybody else ([`Fit`]), but no prompt is overtaken more than [`PASSES`] times by later ones that go to targets which
//! could have had it. Who waits, what they are told, and when a target is asked, is the caller's.

use std::cmp::Reverse;
use std::collections::VecDeque;

use crate::cost::Room;
use crate::load::Load;

/// Prompts that a free target looks at. More find a little more in caches and take longer to decide.
pub const WINDOW: usize = 16;
/// Times that a prompt is overtaken, at most. As many as are looked at: what waits longer than that is as old as all of
/// them together.
pub const PASSES: u32 = 16;
/// Steps' worth of prompts that a target is given: the one that runs and the next, so that it is not idle while the
/// answer of the first is on its way here and another prompt on its way there.
const STEPS: u64 = 2;

/// Says whether a target is to be given a prompt now.
///
/// - `step`: tokens that it computes at once (`max_num_batched_tokens`).
///
/// What is booked counts until a prompt is answered, so a prompt longer than two steps has its target alone.
pub fn has_room(load: &Load, room: Room, step: u64) -> bool {
    load.requests < room.requests && load.prefill_tokens < STEPS.saturating_mul(step).max(1)
}

/// What a target has of a prompt, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// In its cache.
    pub cached: u64,
    /// In the cache of whoever has most of it, busy or not.
    pub most: u64,
}

impl Fit {
    /// Orders fits: what is lost by not waiting for whoever has most, the least first; among equals, what is found.
    fn rank(self) -> (u64, Reverse<u64>) {
        (self.most.saturating_sub(self.cached), Reverse(self.cached))
    }
}

/// Where a prompt stands: lower places were there before. A prompt that comes back takes its place again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(u64);

#[derive(Debug)]
struct Waiting<T> {
    place: Place,
    tokens: u64,
    passed: u32,
    item: T,
}

/// Prompts that wait, in order of their places.
#[derive(Debug)]
pub struct Backlog<T> {
    waiting: VecDeque<Waiting<T>>,
    tokens: u64,
    next: u64,
}

impl<T> Default for Backlog<T> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            tokens: 0,
            next: 0,
        }
    }
}

impl<T> Backlog<T> {
    /// Returns the place behind all others.
    pub fn place(&mut self) -> Place {
        self.next += 1;
        Place(self.next)
    }

    /// Lets a prompt of `tokens` tokens wait at its place, which nobody has.
    pub fn insert(&mut self, place: Place, tokens: u64, item: T) {
        let at = self.waiting.partition_point(|one| one.place < place);
        let waiting = Waiting {
            place,
            tokens,
            passed: 0,
            item,
        };
        self.waiting.insert(at, waiting);
        self.tokens += tokens;
    }

    /// Returns who is next: the first that one of several free targets may have, or, if only one target is free, the one
    /// that fits it best within the bounds. Absent: none of these targets may have any that waits.
    ///
    /// - `free`: how many targets are free.
    /// - `fit`: what the nth of them has of a prompt; absent where it must not have it.
    pub fn next(
        &self,
        free: usize,
        mut fit: impl FnMut(&T, usize) -> Option<Fit>,
    ) -> Option<Place> {
        if free != 1 {
            let mut waiting = self.waiting.iter();
            let first = waiting.find(|one| (0..free).any(|nth| fit(&one.item, nth).is_some()));
            return first.map(|one| one.place);
        }
        let mut best = None;
        let mut seen = 0;
        for one in &self.waiting {
            let Some(fit) = fit(&one.item, 0) else {
                continue;
            };
            let rank = fit.rank();
            if best.is_none_or(|(least, _)| rank < least) {
                best = Some((rank, one.place));
            }
            seen += 1;
            if one.passed >= PASSES || seen == WINDOW {
                break;
            }
        }
        best.map(|(_, place)| place)
    }

    /// Lets a prompt go to a target: those before it have been passed over once more.
    pub fn take(&mut self, place: Place) -> Option<T> {
        let at = self.at(place)?;
        for passed in self.waiting.range_mut(..at) {
            passed.passed += 1;
        }
        self.drop_at(at)
    }

    /// Lets a prompt give up.
    pub fn remove(&mut self, place: Place) -> Option<T> {
        let at = self.at(place)?;
        self.drop_at(at)
    }

    /// Lets those give up for whom that is said, and returns them.
    pub fn remove_if(&mut self, gives_up: impl Fn(&T) -> bool) -> Vec<T> {
        let places = self.waiting.iter().filter(|one| gives_up(&one.item));
        let places: Vec<_> = places.map(|one| one.place).collect();
        let gone = places.into_iter().map(|place| self.remove(place));
        gone.flatten().collect()
    }

    /// Returns a prompt that waits.
    pub fn get(&self, place: Place) -> Option<&T> {
        let at = self.at(place)?;
        Some(&self.waiting[at].item)
    }

    /// Returns how many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Says whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns the tokens of all that wait.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    fn at(&self, place: Place) -> Option<usize> {
        let found = self.waiting.binary_search_by_key(&place, |one| one.place);
        found.ok()
    }

    fn drop_at(&mut self, at: usize) -> Option<T> {
        let gone = self.waiting.remove(at)?;
        self.tokens -= gone.tokens;
        Some(gone.item)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn backlog(names: &[&'static str]) -> Backlog<&'static str> {
        let mut backlog = Backlog::default();
        for name in names {
            let place = backlog.place();
            backlog.insert(place, 10, *name);
        }
        backlog
    }

    fn cached(cached: u64) -> Option<Fit> {
        Some(Fit {
            cached,
            most: cached,
        })
    }

    /// Takes what is next for one free target.
    fn take<T>(backlog: &mut Backlog<T>, fit: impl Fn(&T) -> Option<Fit>) -> Option<T> {
        let place = backlog.next(1, |item, _| fit(item))?;
        backlog.take(place)
    }

    #[test]
    fn a_free_target_takes_what_it_has_most_of_then_what_nobody_has_then_what_others_have() {
        let mut backlog = backlog(&["elsewhere", "cold", "warm", "hot"]);
        let fit = |name: &&str| match *name {
            "elsewhere" => Some(Fit {
                cached: 0,
                most: 900,
            }),
            "warm" => cached(100),
            "hot" => cached(500),
            _ => cached(0),
        };
        let taken: Vec<_> = std::iter::from_fn(|| take(&mut backlog, fit)).collect();
        assert_eq!(taken, ["hot", "warm", "cold", "elsewhere"]);
        assert_eq!((backlog.len(), backlog.tokens()), (0, 0));
    }

    #[test]
    fn among_several_free_targets_the_first_prompt_goes_first() {
        let mut backlog = backlog(&["nobody's", "first", "second"]);
        let fit = |name: &&str, nth: usize| {
            (*name != "nobody's" && nth == 1).then_some(Fit {
                cached: u64::from(*name == "second"),
                most: 1,
            })
        };
        let next = backlog.next(2, fit).unwrap();
        assert_eq!(backlog.take(next), Some("first"));
    }

    #[test]
    fn a_prompt_that_comes_back_takes_its_place_again() {
        let mut backlog = backlog(&["a", "b", "c"]);
        let first = backlog.next(2, |_, _| cached(0)).unwrap();
        let again = backlog.take(first).unwrap();
        assert_eq!(backlog.tokens(), 20);
        backlog.insert(first, 10, again);
        assert_eq!(backlog.next(2, |_, _| cached(0)), Some(first));
        assert_eq!(backlog.remove(first), Some("a"));
        assert_eq!(backlog.remove(first), None);
        assert_eq!(backlog.remove_if(|item| *item == "c"), ["c"]);
        assert_eq!(backlog.len(), 1);
    }

    #[test]
    fn a_target_has_room_for_the_step_that_runs_and_the_next() {
        let load = |requests, prefill_tokens| Load {
            requests,
            prefill_tokens,
            ..Load::default()
        };
        let room = Room {
            requests: 8,
            ..Room::default()
        };
        assert!(has_room(&load(0, 0), room, 0));
        assert!(has_room(&load(7, 4095), room, 2048));
        assert!(!has_room(&load(1, 4096), room, 2048));
        assert!(!has_room(&load(8, 0), room, 2048));
    }

    proptest! {
        /// Whatever is cached where: nobody is overtaken more often than is said, and whoever is free and may have
        /// somebody gets somebody.
        #[test]
        fn nobody_starves_and_nobody_is_idle_while_somebody_waits(
            steps in prop::collection::vec((0_usize..6, prop::collection::vec(0_usize..4, 1..4)), 1..200),
            cached in prop::collection::vec(0_u64..5, 64),
            // Of which targets a prompt may have only one; the others take any.
            bound in prop::collection::vec(prop::option::weighted(0.2, 0_usize..4), 64),
        ) {
            let mut backlog = Backlog::default();
            let mut overtaken: BTreeMap<usize, u32> = BTreeMap::new();
            let mut arrived = 0;
            for (arrivals, free) in steps {
                for _ in 0..arrivals {
                    let place = backlog.place();
                    backlog.insert(place, 1, arrived);
                    overtaken.insert(arrived, 0);
                    arrived += 1;
                }
                let may = |number: usize, target: usize| {
                    bound[number % bound.len()].is_none_or(|only| only == target)
                };
                let fit = |number: &usize, nth: usize| {
                    may(*number, free[nth]).then(|| Fit {
                        cached: cached[(number * 7 + free[nth] * 3) % cached.len()],
                        most: 4,
                    })
                };
                let next = backlog.next(free.len(), fit);
                let could = overtaken.keys().any(|number| free.iter().any(|target| may(*number, *target)));
                prop_assert_eq!(next.is_some(), could);
                let Some(place) = next else { continue };
                let taken = backlog.take(place).expect("it waits");
                prop_assert!(free.iter().any(|target| may(taken, *target)));
                overtaken.remove(&taken);
                for (number, times) in overtaken.range_mut(..taken) {
                    *times += 1;
                    let unbound = bound[number % bound.len()].is_none();
                    prop_assert!(!unbound || *times <= PASSES, "{number} was overtaken {times} times");
                }
            }
            prop_assert_eq!(backlog.len(), overtaken.len());
        }
    }
}
