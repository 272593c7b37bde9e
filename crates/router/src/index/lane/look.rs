//! What a lane answers: who holds how much of a prompt. Nothing here changes anything.

use smallvec::SmallVec;

use super::Lane;
use crate::BlockHash;
use crate::index::blocks::Place;
use crate::index::matches::Matches;
use crate::index::sets::{Holder, SetId};

/// Holders of a prefix: more than these go to the heap.
type Alive = SmallVec<[Holder; 64]>;

impl Lane {
    /// Notes into `out` how many of `hashes` each target holds, from the first on without a gap.
    pub(in crate::index) fn matches(&self, hashes: &[BlockHash], out: &mut Matches) {
        let mut alive = Alive::new();
        let mut last = SetId::NOBODY;
        let mut guess: Option<Place> = None;
        let mut at = 0;
        while at < hashes.len() {
            let Some(place) = self.blocks.find(hashes[at], guess) else {
                break;
            };
            let set = self.blocks.places().set(place);
            if set != last {
                self.sets.members(set, |members| {
                    if at == 0 {
                        alive.extend_from_slice(members);
                    } else {
                        self.outlive(&mut alive, members, at, out);
                    }
                });
                if alive.is_empty() {
                    return;
                }
                last = set;
            }
            let count = self.blocks.places().run(place, &hashes[at..]);
            at += count;
            guess = Some(place + count as u32);
        }
        self.note(&alive, at, out);
    }

    /// Returns how many of `hashes` one target holds, from the first on without a gap.
    pub(in crate::index) fn own(&self, seat: usize, hashes: &[BlockHash]) -> u32 {
        let Some(held) = self.held(seat) else {
            return 0;
        };
        let mut guess: Option<Place> = None;
        let mut at = 0;
        while let Some(hash) = hashes.get(at)
            && let Some(place) = self.blocks.find(*hash, guess)
            && self.sets.contains(self.blocks.places().set(place), held.by)
        {
            let count = self.blocks.places().run(place, &hashes[at..]);
            at += count;
            guess = Some(place + count as u32);
        }
        at as u32
    }

    /// Lengthens the matches of targets that hold what comes after them.
    pub(in crate::index) fn extend(&self, hashes: &[BlockHash], out: &mut Matches) {
        let mut guess: Option<Place> = None;
        for (at, hash) in hashes.iter().enumerate() {
            let Some(place) = self.blocks.find(*hash, guess) else {
                guess = None;
                continue;
            };
            guess = Some(place + 1);
            self.sets
                .members(self.blocks.places().set(place), |members| {
                    for &holder in members {
                        if let Some(target) = self.holders[holder as usize]
                            && out.blocks(target) as usize == at
                        {
                            out.note(target, at as u32 + 1);
                        }
                    }
                });
        }
    }

    /// Keeps of `alive` who is among `members`, and notes the others with the `at` blocks that they have.
    fn outlive(&self, alive: &mut Alive, members: &[Holder], at: usize, out: &mut Matches) {
        let mut members = members.iter().peekable();
        alive.retain(|holder| {
            while members.next_if(|&member| *member < *holder).is_some() {}
            let stays = members.peek() == Some(&&*holder);
            if !stays && let Some(target) = self.holders[*holder as usize] {
                out.note(target, at as u32);
            }
            stays
        });
    }

    fn note(&self, alive: &[Holder], at: usize, out: &mut Matches) {
        for &holder in alive {
            if let Some(target) = self.holders[holder as usize] {
                out.note(target, at as u32);
            }
        }
    }
}
