//! One part of the index: all that some targets hold.
//!
//! Inside, what a target holds is held by its *holder*, a number that it gives up when everything of it is to
//! go: the target takes a new number at once, and the blocks of the old one are cleaned up a few at a time, with
//! each change that comes after. So neither a worker that leaves nor one that empties its cache stops anybody.

mod look;
mod sweep;

use super::blocks::{Blocks, Found, Place};
use super::sets::{Holder, SetId, Sets};
use super::{Memory, Target};
use crate::BlockHash;
use sweep::Sweep;

/// Places that are cleaned up with every change, besides as many as it has blocks.
const SWEEP: usize = 256;

#[derive(Debug)]
pub(super) struct Lane {
    blocks: Blocks,
    sets: Sets,
    /// By the target's number within the lane.
    targets: Vec<Option<Held>>,
    /// By holder: whose it is; nobody's if its blocks are to go.
    holders: Vec<Option<Target>>,
    /// Holders that nothing is held by.
    spare: Vec<Holder>,
    /// Holders whose blocks are to go.
    dead: Vec<Holder>,
    sweep: Option<Sweep>,
}

/// What a target holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    by: Holder,
    /// Whom it is held for.
    owner: Target,
    blocks: u64,
}

impl Lane {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            blocks: Blocks::new(seed),
            sets: Sets::new(seed.rotate_left(32)),
            targets: Vec::new(),
            holders: Vec::new(),
            spare: Vec::new(),
            dead: Vec::new(),
            sweep: None,
        }
    }

    /// Takes in a target, what it holds counting for `owner`.
    pub(super) fn join(&mut self, seat: usize, owner: Target) {
        if self.targets.len() <= seat {
            self.targets.resize(seat + 1, None);
        }
        self.targets[seat] = Some(Held {
            by: self.holder(owner),
            owner,
            blocks: 0,
        });
    }

    /// Forgets a target.
    pub(super) fn leave(&mut self, seat: usize) {
        if let Some(held) = self.targets.get_mut(seat).and_then(Option::take) {
            self.bury(held);
        }
    }

    /// Forgets what a target holds.
    pub(super) fn clear(&mut self, seat: usize) {
        let Some(held) = self.held(seat) else { return };
        if held.blocks == 0 {
            return;
        }
        self.bury(held);
        self.targets[seat] = Some(Held {
            by: self.holder(held.owner),
            owner: held.owner,
            blocks: 0,
        });
        self.sweep(SWEEP);
    }

    /// Returns how many blocks a target holds.
    pub(super) fn held_blocks(&self, seat: usize) -> u64 {
        self.held(seat).map_or(0, |held| held.blocks)
    }

    /// Notes that a target holds blocks. Returns how many of them are new to it.
    pub(super) fn insert(&mut self, seat: usize, hashes: &[BlockHash]) -> u64 {
        let Some(held) = self.held(seat) else {
            return 0;
        };
        let holder = held.by;
        let only = SetId::only(holder);
        let (mut at, mut new) = (0, 0);
        let mut previous: Option<Place> = None;
        let mut change = Change::default();
        while at < hashes.len() {
            let place = match self.blocks.find_or_add(&hashes[at..], previous, only) {
                Found::There(place) => place,
                Found::Added(place, count) => {
                    previous = Some(place + count as u32 - 1);
                    (at, new) = (at + count, new + count as u64);
                    continue;
                }
                // What is not noted is at worst computed again.
                Found::Full => break,
            };
            let count = self.blocks.places().run(place, &hashes[at..]);
            let set = self.blocks.places().set(place);
            let to = change.of(set, || {
                if self.sets.contains(set, holder) {
                    set
                } else {
                    self.sets.with(set, holder)
                }
            });
            if to != set {
                self.blocks.put(place, count, to);
                self.sets.moved(set, to, count);
                new += count as u64;
            }
            (previous, at) = (Some(place + count as u32 - 1), at + count);
        }
        if let Some(Some(held)) = self.targets.get_mut(seat) {
            held.blocks += new;
        }
        self.sweep(SWEEP + hashes.len());
        new
    }

    /// Notes that a target holds blocks no longer.
    pub(super) fn remove(&mut self, seat: usize, hashes: &[BlockHash]) {
        let Some(held) = self.held(seat) else { return };
        let holder = held.by;
        let (mut at, mut gone) = (0, 0);
        let mut guess: Option<Place> = None;
        let mut change = Change::default();
        self.blocks.fetch(hashes);
        while at < hashes.len() {
            let Some(place) = self.blocks.find(hashes[at], guess) else {
                at += 1;
                continue;
            };
            let up = self.blocks.places().run(place, &hashes[at..]);
            // Engines give up the end of a prefix first.
            let count = if up > 1 {
                up
            } else {
                self.blocks.places().run_down(place, &hashes[at..])
            };
            let first = if up > 1 {
                place
            } else {
                place + 1 - count as u32
            };
            let set = self.blocks.places().set(place);
            let to = change.of(set, || {
                if self.sets.contains(set, holder) {
                    self.sets.without(set, holder)
                } else {
                    set
                }
            });
            if to != set {
                self.put(first, count, set, to);
                gone += count as u64;
            }
            guess = if up > 1 {
                Some(first + count as u32)
            } else {
                first.checked_sub(1)
            };
            at += count;
        }
        if let Some(Some(held)) = self.targets.get_mut(seat) {
            held.blocks -= gone;
        }
        self.sweep(SWEEP + hashes.len());
    }

    /// Says whether nobody holds anything.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.len() == 0
    }

    pub(super) fn memory(&self) -> Memory {
        let held = self.targets.iter().flatten();
        Memory {
            bytes: self.blocks.memory() + self.sets.memory(),
            blocks: self.blocks.len(),
            held: held.map(|held| held.blocks).sum(),
        }
    }

    fn held(&self, seat: usize) -> Option<Held> {
        self.targets.get(seat).copied().flatten()
    }

    fn holder(&mut self, target: Target) -> Holder {
        let holder = self.spare.pop().unwrap_or_else(|| {
            self.holders.push(None);
            (self.holders.len() - 1) as Holder
        });
        self.holders[holder as usize] = Some(target);
        holder
    }

    fn bury(&mut self, held: Held) {
        self.holders[held.by as usize] = None;
        if held.blocks == 0 {
            self.spare.push(held.by);
        } else {
            self.dead.push(held.by);
        }
    }

    /// Changes the holders of blocks that lie side by side, and forgets those without any.
    fn put(&mut self, place: Place, count: usize, from: SetId, to: SetId) {
        if to == SetId::NOBODY {
            self.blocks.free(place, count);
        } else {
            self.blocks.put(place, count, to);
        }
        self.sets.moved(from, to, count);
    }
}

/// What a change makes of the set that was met last: blocks side by side mostly have the same.
///
/// A set may be forgotten once no block has it, and its number given to another. That other one comes about here only, and
/// takes the place of what was remembered.
#[derive(Default)]
struct Change(Option<(SetId, SetId)>);

impl Change {
    fn of(&mut self, set: SetId, to: impl FnOnce() -> SetId) -> SetId {
        match self.0 {
            Some((from, to)) if from == set => to,
            Some(_) | None => {
                let to = to();
                self.0 = Some((set, to));
                to
            }
        }
    }
}
