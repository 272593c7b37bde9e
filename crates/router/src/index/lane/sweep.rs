//! Cleaning up what holders that are nobody's left behind, a few places at a time.

use smallvec::SmallVec;

use super::{Change, Lane};
use crate::index::blocks::Place;
use crate::index::sets::{Holder, SetId, Sets};

/// One pass over all places.
#[derive(Debug)]
pub(super) struct Sweep {
    /// Places below are still to be looked at. Downwards, so that what is freed is taken again in ascending order.
    below: usize,
    /// Ascending.
    dying: Vec<Holder>,
}

impl Lane {
    /// Cleans up at most `places` places. Returns whether anything is left to clean up.
    pub(in crate::index) fn sweep(&mut self, places: usize) -> bool {
        let mut sweep = match self.sweep.take() {
            Some(sweep) => sweep,
            None if self.dead.is_empty() => return false,
            None => {
                let mut dying = std::mem::take(&mut self.dead);
                dying.sort_unstable();
                Sweep {
                    below: self.blocks.places().len(),
                    dying,
                }
            }
        };
        // Without the last block the places are gone, too.
        sweep.below = sweep.below.min(self.blocks.places().len());
        let end = sweep.below.saturating_sub(places);
        let mut change = Change::default();
        while sweep.below > end {
            let most = sweep.below - end;
            let count = self.blocks.places().alike_below(sweep.below, most);
            sweep.below -= count;
            let place = sweep.below as Place;
            let set = self.blocks.places().set(place);
            if set == SetId::NOBODY {
                continue;
            }
            let to = match set.single() {
                Some(holder) if sweep.dying.binary_search(&holder).is_ok() => SetId::NOBODY,
                Some(_) => set,
                None => change.of(set, || survivors(&mut self.sets, set, &sweep.dying)),
            };
            if to != set {
                self.put(place, count, set, to);
                sweep.below = sweep.below.min(self.blocks.places().len());
            }
        }
        if sweep.below > 0 {
            self.sweep = Some(sweep);
            return true;
        }
        self.spare.extend(sweep.dying);
        !self.dead.is_empty()
    }
}

/// Returns the set without those that are dying.
fn survivors(sets: &mut Sets, set: SetId, dying: &[Holder]) -> SetId {
    let gone: SmallVec<[Holder; 8]> = sets.members(set, |members| {
        let gone = members
            .iter()
            .filter(|member| dying.binary_search(member).is_ok());
        gone.copied().collect()
    });
    let mut left = set;
    for holder in gone {
        let next = sets.without(left, holder);
        if left != set {
            // Of use for this step only.
            sets.moved(left, left, 0);
        }
        left = next;
    }
    left
}
