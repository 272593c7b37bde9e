//! What a lookup found.

use super::Target;

/// How many blocks of a prompt each target holds, from the first on without a gap.
///
/// Used again for the next lookup, so that none allocates.
#[derive(Clone, Debug, Default)]
pub struct Matches {
    /// By the target's number.
    blocks: Vec<u32>,
    /// Those with any.
    found: Vec<Target>,
}

impl Matches {
    /// Returns how many blocks a target holds.
    pub fn blocks(&self, target: Target) -> u32 {
        self.blocks.get(target.0 as usize).copied().unwrap_or(0)
    }

    /// Returns the targets that hold the first block, with how many they hold; in no order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Target, u32)> {
        self.found
            .iter()
            .map(|&target| (target, self.blocks[target.0 as usize]))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for target in self.found.drain(..) {
            self.blocks[target.0 as usize] = 0;
        }
    }

    /// Becomes equal to another.
    pub(crate) fn copy(&mut self, other: &Self) {
        self.clear();
        for (target, blocks) in other.iter() {
            self.note(target, blocks);
        }
    }

    /// Notes that a target holds at least that many.
    pub(super) fn note(&mut self, target: Target, blocks: u32) {
        let at = target.0 as usize;
        if self.blocks.len() <= at {
            self.blocks.resize(at + 1, 0);
        }
        if self.blocks[at] == 0 && blocks > 0 {
            self.found.push(target);
        }
        self.blocks[at] = self.blocks[at].max(blocks);
    }
}
