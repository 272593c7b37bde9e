//! Prompts that wait until a target has room, and which of them it takes.
//!
//! Late binding: nothing is sent to a target that could not begin it soon, so a prompt that waits goes to whoever can have
//! it ready first as things are then, and one that a worker could not finish is not stuck behind it. The decision is made
//! anew whenever something changes: prompts, in their order, are laid on targets in thought, each where it would be
//! ready first after what is there already; of those that a target with room would get, it takes the one that it
//! has most of. So a prompt also waits for a busy target, while that is quicker than to compute elsewhere what is
//! cached there. But none is overtaken more than [`PASSES`] times per target: then whoever has room takes it. Who waits, what they are
//! told, and when targets are asked, is the caller's.

mod pull;

use std::collections::VecDeque;

use smallvec::{SmallVec, smallvec};

use crate::cost::Room;
use crate::load::Load;
pub use pull::{Claim, Pulled};

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
            let begins = !with_room.is_empty();
            if begins && fits_better {
                let next = Next {
                    place: one.place,
                    targets: with_room,
                };
                best = Some((most, next));
            }
            seen += 1;
            // Nobody overtakes it any more; but who can only wait for one that is busy holds up nobody else.
            if overdue && begins {
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
            passed.passed = passed.passed.saturating_add(1);
        }
        self.drop_at(at)
    }

    /// Lets those of whom that is said wait for no busy target any longer: for when those do not become free.
    pub fn hurry(&mut self, hurries: impl Fn(&T) -> bool) {
        let hurried = self.waiting.iter_mut().filter(|one| hurries(&one.item));
        hurried.for_each(|one| one.passed = u32::MAX);
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

    /// Returns all that wait, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|one| &one.item)
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
mod tests;
