//! What a target probably holds, learned from what was sent to it.
//!
//! For engines that tell nothing of their caches, and for the moments until an engine has told of a prompt that was just
//! sent there. Each prompt is noted with all its blocks in the newest of a few slices of time; a slice whose time
//! is over, or that must make room, is forgotten as a whole. So nothing is kept per block: a
//! prefix is remembered for [`Bound::ttl`] after its last use, an eighth of that more at most.

use std::collections::VecDeque;
use std::time::Duration;

use crate::BlockHash;
use crate::index::{Index, Target};

/// Slices that a target's memory is cut into. More forget more precisely and keep hot prefixes as often more.
const SLICES: u32 = 8;

/// What is remembered at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// How long.
    pub ttl: Duration,
    /// How many blocks: as many as the target's cache has, since it forgets by last use, too.
    pub blocks: u64,
}

/// What was sent to one target.
#[derive(Debug)]
pub struct Learned {
    owner: Target,
    bound: Bound,
    /// The oldest first.
    slices: VecDeque<Slice>,
}

#[derive(Clone, Copy, Debug)]
struct Slice {
    target: Target,
    since: Duration,
    last: Duration,
    blocks: u64,
}

impl Learned {
    /// Returns an empty memory, whose blocks lookups report as those of `owner`.
    pub fn new(owner: Target, bound: Bound) -> Self {
        Self {
            owner,
            bound,
            slices: VecDeque::new(),
        }
    }

    /// Notes that a prompt was sent.
    ///
    /// - `hashes`: of all its blocks, from the first on.
    /// - `now`: since any fixed moment.
    pub fn learn(&mut self, index: &Index, hashes: &[BlockHash], now: Duration) {
        self.expire(index, now);
        let most = usize::try_from(self.bound.blocks).unwrap_or(usize::MAX);
        let hashes = &hashes[..hashes.len().min(most)];
        if hashes.is_empty() {
            return;
        }
        let (ttl, blocks) = (
            self.bound.ttl / SLICES,
            self.bound.blocks / u64::from(SLICES),
        );
        let fits = |slice: &&mut Slice| {
            now.saturating_sub(slice.since) < ttl
                && (slice.blocks == 0 || slice.blocks + hashes.len() as u64 <= blocks)
        };
        let slice = match self.slices.back_mut().filter(fits) {
            Some(slice) => slice,
            None => {
                let target = self.make_room(index, hashes.len() as u64);
                self.slices.push_back(Slice {
                    target: target.unwrap_or_else(|| index.join_for(self.owner)),
                    since: now,
                    last: now,
                    blocks: 0,
                });
                self.slices.back_mut().expect("one was added")
            }
        };
        slice.last = now;
        slice.blocks += index.insert(slice.target, hashes);
    }

    /// Forgets what was used last too long ago.
    pub fn expire(&mut self, index: &Index, now: Duration) {
        while let Some(oldest) = self.slices.front()
            && now.saturating_sub(oldest.last) >= self.bound.ttl
        {
            index.leave(oldest.target);
            self.slices.pop_front();
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, index: &Index) {
        for slice in self.slices.drain(..) {
            index.leave(slice.target);
        }
    }

    /// Returns how many blocks are remembered, each counted once per slice.
    pub fn blocks(&self) -> u64 {
        self.slices.iter().map(|slice| slice.blocks).sum()
    }

    /// Forgets the oldest until there is room for one more slice. Returns what may be used again.
    fn make_room(&mut self, index: &Index, blocks: u64) -> Option<Target> {
        let mut spare = None;
        while self.slices.len() >= SLICES as usize
            || (!self.slices.is_empty() && self.blocks() + blocks > self.bound.blocks)
        {
            let oldest = self.slices.pop_front()?;
            if let Some(spare) = spare.replace(oldest.target) {
                index.leave(spare);
            }
        }
        if let Some(spare) = spare {
            index.clear(spare);
        }
        spare
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash;
    use crate::index::Matches;

    fn prompt(n: u32, blocks: u32) -> Vec<BlockHash> {
        let tokens: Vec<u32> = (0..blocks).map(|at| n << 16 | at).collect();
        hash::blocks(hash::root("", ""), &tokens, 1)
    }

    fn known(index: &Index, target: Target, hashes: &[BlockHash]) -> u32 {
        let mut matches = Matches::default();
        index.matches(hashes, &mut matches);
        matches.blocks(target)
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_prefix_is_known_for_its_time_after_its_last_use() {
        let index = Index::new(1, 1);
        let target = index.join();
        let bound = Bound {
            ttl: at(80),
            blocks: 1000,
        };
        let mut learned = Learned::new(target, bound);
        let (one, two) = (prompt(1, 20), prompt(2, 20));
        learned.learn(&index, &one, at(0));
        learned.learn(&index, &two, at(1));
        learned.learn(&index, &one[..10], at(50));
        learned.expire(&index, at(79));
        assert_eq!(known(&index, target, &one), 20);
        learned.expire(&index, at(90));
        assert_eq!(known(&index, target, &one), 10);
        assert_eq!(known(&index, target, &two), 0);
        learned.expire(&index, at(140));
        assert_eq!((known(&index, target, &one), learned.blocks()), (0, 0));
    }

    #[test]
    fn what_was_used_least_lately_makes_room() {
        let index = Index::new(1, 1);
        let target = index.join();
        let bound = Bound {
            ttl: at(1_000_000),
            blocks: 800,
        };
        let mut learned = Learned::new(target, bound);
        for n in 0..100 {
            learned.learn(&index, &prompt(n, 50), at(u64::from(n)));
            assert!(learned.blocks() <= 800);
        }
        while index.sweep() {}
        assert!(index.memory().held <= 800);
        assert_eq!(known(&index, target, &prompt(99, 50)), 50);
        assert_eq!(known(&index, target, &prompt(90, 50)), 50);
        assert_eq!(known(&index, target, &prompt(0, 50)), 0);
    }

    #[test]
    fn a_prompt_longer_than_the_cache_is_known_as_far_as_that_holds_it() {
        let index = Index::new(1, 1);
        let target = index.join();
        let bound = Bound {
            ttl: at(100),
            blocks: 64,
        };
        let mut learned = Learned::new(target, bound);
        learned.learn(&index, &prompt(1, 500), at(0));
        assert_eq!(known(&index, target, &prompt(1, 500)), 64);
    }
}
