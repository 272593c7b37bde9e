//! Prompts that wait until a target has room, and which of them it takes.
//!
//! Late binding: nothing is sent to a target that could not begin it soon, so a prompt that waits goes to whoever can have
//! it ready first as things are then, and one that a worker could not finish is not stuck behind it. The decision is made
//! anew whenever something changes: prompts, in their order, are laid on targets in thought, each where it would be
//! ready first after what is there already; of those that a target with room would get, it takes the one that it
//! has most of. So a prompt also waits for a busy target, while that is quicker than to compute elsewhere what is
//! cached there. But none is overtaken more than [`PASSES`] times per target: then whoever has room takes it. Who waits, what they are
//! told, and when targets are asked, is the caller's.

use std::collections::VecDeque;

use smallvec::{SmallVec, smallvec};

use crate::cost::Room;
use crate::load::Load;

/// Prompts that are looked at, besides [`WINDOW_PER_TARGET`] for each target. More find a little more in caches and take
/// longer to decide.
const WINDOW: usize = 16;
/// Each busy target is laid some before a free one gets any.
const WINDOW_PER_TARGET: usize = 2;
/// Times that a prompt is overtaken, at most, for each target there is: what a target computes while others are preferred
/// for its cache. With fewer, prompts that wait for a cache are soon driven elsewhere (docs/benchmarks/dispatch.md).
pub const PASSES: u32 = 4;
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

/// A target that could take prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// Tokens that it has to compute before.
    pub queued: u64,
    /// Whether it is to be given a prompt now ([`has_room`]).
    pub room: bool,
}

/// What a target has of a prompt, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// In its cache.
    pub cached: u64,
    /// To be computed there.
    pub uncached: u64,
}

/// A prompt whose turn it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The prompt.
    pub place: Place,
    /// The targets with room where it is ready first, equally soon; never empty.
    pub targets: Targets,
}

/// Numbers of targets.
pub type Targets = SmallVec<[usize; 16]>;

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

    /// Returns whose turn it is. Absent: nobody waits whom a target with room may have, or who is not ready sooner by
    /// waiting for another.
    ///
    /// - `seats`: all targets.
    /// - `fits`: writes what each target has of a prompt, where it may have it; what is there before is `None`.
    pub fn next(
        &self,
        seats: &[Seat],
        mut fits: impl FnMut(&T, &mut [Option<Fit>]),
    ) -> Option<Next> {
        if !seats.iter().any(|seat| seat.room) {
            return None;
        }
        let mut queued: SmallVec<[u64; 16]> = seats.iter().map(|seat| seat.queued).collect();
        let mut fit: SmallVec<[Option<Fit>; 16]> = SmallVec::from_elem(None, seats.len());
        // The first that gets a target with room, or who has more there.
        let mut best: Option<(u64, Next)> = None;
        // The one that loses least if it does not wait for a busy target, for when all that are looked at would.
        let mut least_loss: Option<(u64, Next)> = None;
        let window = WINDOW + WINDOW_PER_TARGET * seats.len();
        let passes = PASSES.saturating_mul(u32::try_from(seats.len()).unwrap_or(u32::MAX));
        let mut seen = 0;
        for one in &self.waiting {
            fit.fill(None);
            fits(&one.item, &mut fit);
            let overdue = one.passed >= passes;
            let Some(targets) = soonest(seats, &queued, &fit, overdue) else {
                continue;
            };
            if best.is_none() {
                let soonest = targets[0];
                let at_best = queued[soonest] + fit[soonest].map_or(0, |fit| fit.uncached);
                let with_room = ready(seats, &queued, &fit, true);
                if let Some((nth, at)) = with_room.min_by_key(|(_, at)| *at) {
                    let loss = at - at_best;
                    if least_loss.as_ref().is_none_or(|(least, _)| loss < *least) {
                        let next = Next {
                            place: one.place,
                            targets: smallvec![nth],
                        };
                        least_loss = Some((loss, next));
                    }
                }
            }
            let cached = |nth: &usize| fit[*nth].map_or(0, |fit| fit.cached);
            let most = targets.iter().map(cached).max().unwrap_or(0);
            let first = targets[0];
            queued[first] += fit[first].map_or(0, |fit| fit.uncached);
            let with_room = targets.iter().copied().filter(|nth| seats[*nth].room);
            let with_room: Targets = with_room.collect();
            let fits_better = match &best {
                None => true,
                Some((least, next)) => {
                    most > *least && with_room.iter().any(|nth| next.targets.contains(nth))
                }
            };
            if !with_room.is_empty() && fits_better {
                let next = Next {
                    place: one.place,
                    targets: with_room,
                };
                best = Some((most, next));
            }
            seen += 1;
            if overdue {
                break;
            }
            if seen == window {
                // Nobody knows what those behind would find, so nobody is idle for them.
                best = best.or(least_loss);
                break;
            }
        }
        best.map(|(_, next)| next)
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

/// Returns the targets where a prompt is ready first; absent: none may have it.
///
/// - `overdue`: whether it does not wait while any has room.
fn soonest(seats: &[Seat], queued: &[u64], fit: &[Option<Fit>], overdue: bool) -> Option<Targets> {
    let with_room = overdue && ready(seats, queued, fit, true).next().is_some();
    let least = ready(seats, queued, fit, with_room)
        .map(|(_, at)| at)
        .min()?;
    let soonest = ready(seats, queued, fit, with_room).filter(|(_, at)| *at == least);
    let mut targets: Targets = soonest.map(|(nth, _)| nth).collect();
    // Among equals one that can begin.
    targets.sort_by_key(|nth| !seats[*nth].room);
    Some(targets)
}

/// Returns when a prompt is ready at each target that may have it, in tokens.
///
/// - `room`: whether only those with room are meant.
fn ready<'a>(
    seats: &'a [Seat],
    queued: &'a [u64],
    fit: &'a [Option<Fit>],
    room: bool,
) -> impl Iterator<Item = (usize, u64)> + 'a {
    let targets = fit.iter().enumerate();
    targets.filter_map(move |(nth, fit)| {
        let at = queued[nth] + (*fit)?.uncached;
        (seats[nth].room || !room).then_some((nth, at))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const FREE: Seat = Seat {
        queued: 0,
        room: true,
    };

    fn busy(queued: u64) -> Seat {
        Seat {
            queued,
            room: false,
        }
    }

    fn backlog(names: &[&'static str]) -> Backlog<&'static str> {
        let mut backlog = Backlog::default();
        for name in names {
            let place = backlog.place();
            backlog.insert(place, 10, *name);
        }
        backlog
    }

    /// What there is to do for a prompt of a thousand tokens.
    fn cached(cached: u64) -> Option<Fit> {
        Some(Fit {
            cached,
            uncached: 1000 - cached,
        })
    }

    #[test]
    fn a_free_target_takes_what_it_has_most_of() {
        let mut backlog = backlog(&["cold", "warm", "hot"]);
        let fits = |name: &&str, out: &mut [Option<Fit>]| {
            out.fill(cached(0));
            out[0] = cached(match *name {
                "warm" => 300,
                "hot" => 500,
                _ => 0,
            });
        };
        let seats = [FREE, busy(9000)];
        let taken = std::iter::from_fn(|| {
            let next = backlog.next(&seats, fits)?;
            assert_eq!(next.targets[..], [0]);
            backlog.take(next.place)
        });
        assert_eq!(taken.collect::<Vec<_>>(), ["hot", "warm", "cold"]);
        assert_eq!((backlog.len(), backlog.tokens()), (0, 0));
    }

    #[test]
    fn what_is_cached_at_a_busy_target_is_waited_for_while_that_is_quicker() {
        let backlog = backlog(&["first", "second"]);
        let at = |queued: u64| {
            backlog.next(&[FREE, busy(queued)], |_, out| {
                out[0] = cached(0);
                out[1] = cached(800);
            })
        };
        // 200 after 500, and 200 after 700, are less than 1000.
        assert_eq!(at(500), None);
        // Then the second would be ready later there than here.
        let place = |nth| backlog.waiting[nth].place;
        assert_eq!(at(700).unwrap().place, place(1));
        assert_eq!(at(801).unwrap().place, place(0));
    }

    #[test]
    fn no_target_is_idle_for_prompts_that_nobody_looks_at() {
        let next = |waiting: usize| {
            let backlog = backlog(&vec!["all at the other"; waiting]);
            let next = backlog.next(&[FREE, busy(10)], |_, out| {
                out[0] = cached(0);
                out[1] = cached(1000);
            });
            next.map(|next| (next.place, next.targets[0]))
        };
        assert_eq!(next(10), None);
        assert_eq!(next(100), Some((Place(1), 0)));
    }

    #[test]
    fn equally_free_targets_are_left_to_the_caller_and_forbidden_ones_are_not_named() {
        let backlog = backlog(&["nobody's", "any's"]);
        let next = backlog.next(&[FREE; 3], |name, out| {
            if *name == "any's" {
                out[1] = cached(0);
                out[2] = cached(0);
            }
        });
        assert_eq!(next.unwrap().targets[..], [1, 2]);
    }

    #[test]
    fn a_prompt_that_comes_back_takes_its_place_again() {
        let mut backlog = backlog(&["a", "b", "c"]);
        let next = |backlog: &Backlog<_>| {
            let next = backlog.next(&[FREE], |_, out| out.fill(cached(0)));
            next.unwrap().place
        };
        let first = next(&backlog);
        let again = backlog.take(first).unwrap();
        assert_eq!(backlog.tokens(), 20);
        backlog.insert(first, 10, again);
        assert_eq!(next(&backlog), first);
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
        /// Whatever is cached where: nobody is overtaken more often than is said, and no target is idle while somebody
        /// waits whom it may have and of whom nobody else has more.
        #[test]
        fn nobody_starves_and_nobody_is_idle_for_nothing(
            steps in prop::collection::vec((0_usize..6, prop::collection::vec((any::<bool>(), 0_u64..2000), 4)), 1..200),
            held in prop::collection::vec(0_u64..1000, 64),
            // Of which targets a prompt may have only one; the others take any.
            bound in prop::collection::vec(prop::option::weighted(0.2, 0_usize..4), 64),
        ) {
            let mut backlog = Backlog::default();
            let mut overtaken: BTreeMap<usize, u32> = BTreeMap::new();
            let mut arrived = 0;
            let may = |number: usize, target: usize| {
                bound[number % bound.len()].is_none_or(|only| only == target)
            };
            let has = |number: usize, target: usize| held[(number * 7 + target * 3) % held.len()];
            for (arrivals, seats) in steps {
                for _ in 0..arrivals {
                    let place = backlog.place();
                    backlog.insert(place, 1, arrived);
                    overtaken.insert(arrived, 0);
                    arrived += 1;
                }
                let seats: Vec<_> = seats
                    .into_iter()
                    .map(|(room, queued)| Seat { room, queued: if room { 0 } else { queued } })
                    .collect();
                let next = backlog.next(&seats, |number, out| {
                    for (target, out) in out.iter_mut().enumerate() {
                        *out = may(*number, target).then(|| cached(has(*number, target))).flatten();
                    }
                });
                let best_here = |number: usize| (0..seats.len()).any(|target| {
                    seats[target].room && may(number, target)
                        && (0..seats.len()).all(|other| !may(number, other) || has(number, other) <= has(number, target))
                });
                let first = overtaken.keys().next();
                if first.is_some_and(|first| best_here(*first)) {
                    prop_assert!(next.is_some());
                }
                let Some(Next { place, targets }) = next else { continue };
                let taken = backlog.take(place).expect("it waits");
                prop_assert!(targets.iter().all(|target| seats[*target].room && may(taken, *target)));
                prop_assert!(!targets.is_empty());
                overtaken.remove(&taken);
                for (number, times) in overtaken.range_mut(..taken) {
                    *times += 1;
                    let unbound = bound[number % bound.len()].is_none();
                    prop_assert!(!unbound || *times <= PASSES * 4, "{number} was overtaken {times} times");
                }
            }
            prop_assert_eq!(backlog.len(), overtaken.len());
        }
    }
}
