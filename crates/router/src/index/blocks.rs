//! Blocks by name: where each one lies, and which set of holders it has.
//!
//! Blocks that were inserted together lie side by side, in the order of their prefix. So a prompt is looked up by one
//! probe of the hash table for its first block; the others are mostly found by comparing memory. Neighbourhood is
//! only a guess, which the comparison checks: whatever it misses is asked of the table.
//!
//! A block that goes leaves its entry in the table behind, which then leads to a free place or to another block, as
//! looking there shows; the table is made anew when too much of it is of that kind. So to forget blocks costs
//! next to nothing.
//!
//! A block costs 12 bytes here (name and set), an eighth more where places are free, and 7 to 16 in the table.

use std::hint::black_box;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::sets::SetId;
use crate::BlockHash;

/// Entries of the table keep the place in the lower bits and a piece of the hash above, which saves most looks at
/// other blocks.
const PLACE_BITS: u32 = 26;
const PLACE_MASK: u32 = (1 << PLACE_BITS) - 1;
/// Nothing was ever here. As a place this is beyond [`MOST`].
const EMPTY: u32 = u32::MAX;
/// Blocks at most: 67 million, more than the GPU memory of a thousand workers holds.
const MOST: usize = PLACE_MASK as usize - 1;
/// The end of the list of free places.
const NONE: u32 = u32::MAX;
/// Blocks that are added at once, so that memory answers for the table entries of all of them together.
const TOGETHER: usize = 16;
/// Length of the smallest table.
const LEAST: usize = 64;

/// Where a block lies.
pub(super) type Place = u32;

#[derive(Debug)]
pub(super) struct Blocks {
    /// Names; of a free place the neighbours in the list of free places: next, previous.
    hashes: Vec<u64>,
    /// Holders; [`SetId::NOBODY`] marks a free place.
    sets: Vec<SetId>,
    free: u32,
    live: usize,
    table: Vec<u32>,
    /// Entries of the table that are not [`EMPTY`], of blocks that have gone as well.
    used: usize,
    /// Unknown to clients, who could otherwise choose prompts that meet at one entry.
    key: u64,
}

/// What became of blocks that were to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The first one is here already.
    There(Place),
    /// So many lie side by side from here on, and are new; the next one may be here already.
    Added(Place, usize),
    /// There is no room for more.
    Full,
}

impl Blocks {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            hashes: Vec::new(),
            sets: Vec::new(),
            free: NONE,
            live: 0,
            table: Vec::new(),
            used: 0,
            // Odd, so that no two hashes are mixed into one.
            key: xxh3_64_with_seed(b"blocks", seed) | 1,
        }
    }

    /// Returns how many blocks there are.
    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Returns the number of places, free ones included.
    pub(super) fn places(&self) -> usize {
        self.sets.len()
    }

    /// Returns the bytes that all of it takes.
    pub(super) fn memory(&self) -> usize {
        self.hashes.capacity() * size_of::<u64>()
            + self.sets.capacity() * size_of::<SetId>()
            + self.table.capacity() * size_of::<u32>()
    }

    /// Returns the holders of the block at a place.
    pub(super) fn set(&self, place: Place) -> SetId {
        self.sets[place as usize]
    }

    /// Changes the holders of `count` blocks that lie side by side.
    pub(super) fn put(&mut self, place: Place, count: usize, set: SetId) {
        let from = place as usize;
        self.sets[from..from + count].fill(set);
    }

    /// Finds a block: at `guess` if it lies there, else by the table.
    pub(super) fn find(&self, hash: BlockHash, guess: Option<Place>) -> Option<Place> {
        if let Some(guess) = guess
            && self.hashes.get(guess as usize) == Some(&hash.0)
            && self.sets[guess as usize] != SetId::NOBODY
        {
            return Some(guess);
        }
        self.search(hash.0, self.mix(hash.0)).ok()
    }

    /// Returns how many of `hashes` lie side by side from `place` on with the same holders as the block there, at least
    /// one: the block at `place` is the first.
    pub(super) fn run(&self, place: Place, hashes: &[BlockHash]) -> usize {
        let from = place as usize;
        let most = hashes.len().min(self.hashes.len() - from);
        let names = &self.hashes[from..from + most];
        let sets = &self.sets[from..from + most];
        let set = sets[0];
        let mut at = 0;
        // Eight at a time, without a branch for each: the compiler makes vector instructions of it.
        while at + 8 <= most {
            let mut differ = 0;
            for i in at..at + 8 {
                differ |= names[i] ^ hashes[i].0;
                differ |= u64::from(sets[i].0 ^ set.0);
            }
            if differ != 0 {
                break;
            }
            at += 8;
        }
        while at < most && names[at] == hashes[at].0 && sets[at] == set {
            at += 1;
        }
        at.max(1)
    }

    /// Does what [`Blocks::run`] does, downwards from `place`: for blocks that are given from the end of their prefix.
    pub(super) fn run_down(&self, place: Place, hashes: &[BlockHash]) -> usize {
        let from = place as usize;
        let set = self.sets[from];
        let below = (0..=from).rev().zip(hashes);
        let same =
            below.take_while(|(at, hash)| self.hashes[*at] == hash.0 && self.sets[*at] == set);
        same.count().max(1)
    }

    /// Finds the first of some blocks as [`Blocks::find`] does, after the one before it in the prefix; or else adds it
    /// there, and what comes after it as well, as far as that is new.
    ///
    /// - `hashes`: not empty.
    pub(super) fn find_or_add(
        &mut self,
        hashes: &[BlockHash],
        previous: Option<Place>,
        set: SetId,
    ) -> Found {
        let guess = previous.map_or(NONE, |previous| previous + 1) as usize;
        if self.hashes.get(guess) == Some(&hashes[0].0) && self.sets[guess] != SetId::NOBODY {
            return Found::There(guess as Place);
        }
        let hashes = &hashes[..hashes.len().min(TOGETHER)];
        self.reserve(hashes.len());
        let first = self.mix(hashes[0].0);
        let vacant = match self.search(hashes[0].0, first) {
            Ok(place) => return Found::There(place),
            Err(vacant) => vacant,
        };
        let Some((place, count)) = self.room(previous, hashes.len()) else {
            return Found::Full;
        };
        let hashes = &hashes[..count];
        self.occupy(place, hashes);
        self.enter(vacant, first, place, set);

        // All of the memory is asked before any of it is needed.
        let mut mixed = [0; TOGETHER];
        let mut asked = 0;
        for (mixed, hash) in mixed.iter_mut().zip(hashes).skip(1) {
            *mixed = self.mix(hash.0);
            asked ^= self.table[self.home(*mixed)];
        }
        black_box(asked);
        let mut added = 1;
        while added < count {
            let Err(vacant) = self.search(hashes[added].0, mixed[added]) else {
                break;
            };
            self.enter(vacant, mixed[added], place + added as u32, set);
            added += 1;
        }
        self.vacate(place + added as u32, count - added);
        self.live += added;
        Found::Added(place, added)
    }

    /// Removes `count` blocks that lie side by side.
    pub(super) fn free(&mut self, place: Place, count: usize) {
        self.live -= count;
        if self.live == 0 {
            *self = Self::new(self.key);
        } else {
            self.vacate(place, count);
        }
    }

    fn mix(&self, hash: u64) -> u64 {
        hash.wrapping_mul(self.key)
    }

    /// By the upper bits, which depend on all of the hash.
    fn home(&self, mixed: u64) -> usize {
        ((u128::from(mixed) * self.table.len() as u128) >> 64) as usize
    }

    /// Returns the place of a block, or the entry of the table that would take it.
    fn search(&self, hash: u64, mixed: u64) -> Result<Place, usize> {
        let len = self.table.len();
        if len == 0 {
            return Err(0);
        }
        let tag = entry(mixed, 0);
        let mut at = self.home(mixed);
        loop {
            let found = self.table[at];
            if found == EMPTY {
                return Err(at);
            }
            if found & !PLACE_MASK == tag {
                let place = found & PLACE_MASK;
                // The entry may be of a block that has gone, and its place free, taken by another, or none any more.
                if self.hashes.get(place as usize) == Some(&hash)
                    && self.sets[place as usize] != SetId::NOBODY
                {
                    return Ok(place);
                }
            }
            at += 1;
            if at == len {
                at = 0;
            }
        }
    }

    /// Lets a block be found at a place that it was put into.
    fn enter(&mut self, vacant: usize, mixed: u64, place: Place, set: SetId) {
        self.table[vacant] = entry(mixed, place);
        self.used += 1;
        self.sets[place as usize] = set;
    }

    /// Makes room for more entries.
    fn reserve(&mut self, count: usize) {
        // At most three fifths are used: a search in vain takes four looks, which lie side by side.
        if (self.used + count) * 5 > self.table.len() * 3 {
            self.rebuild();
        }
    }

    #[cold]
    fn rebuild(&mut self) {
        let len = (self.live * 4).max(LEAST);
        self.table = Vec::new();
        self.table = vec![EMPTY; len];
        self.used = 0;
        let mut mixed = [0; TOGETHER];
        for from in (0..self.sets.len()).step_by(TOGETHER) {
            let count = TOGETHER.min(self.sets.len() - from);
            let mut asked = 0;
            for (mixed, hash) in mixed.iter_mut().zip(&self.hashes[from..from + count]) {
                *mixed = self.mix(*hash);
                asked ^= self.table[self.home(*mixed)];
            }
            black_box(asked);
            for (place, &mixed) in (from..from + count).zip(&mixed) {
                if self.sets[place] == SetId::NOBODY {
                    continue;
                }
                let mut vacant = self.home(mixed);
                while self.table[vacant] != EMPTY {
                    vacant += 1;
                    if vacant == len {
                        vacant = 0;
                    }
                }
                self.table[vacant] = entry(mixed, place as u32);
                self.used += 1;
            }
        }
    }

    /// Finds free places side by side, for at most `count` blocks and at least one.
    fn room(&self, previous: Option<Place>, count: usize) -> Option<(Place, usize)> {
        let free_from = |place: Place| {
            let sets = self.sets[place as usize..].iter().take(count);
            (place, sets.take_while(|&&set| set == SetId::NOBODY).count())
        };
        let after = previous.map_or(NONE, |previous| previous + 1);
        if self.sets.get(after as usize) == Some(&SetId::NOBODY) {
            return Some(free_from(after));
        }
        // New places keep a prefix together, which is worth an eighth of the memory.
        let len = self.sets.len();
        let more = MOST - len;
        let new = after as usize == len && (len - self.live) * 8 < self.live;
        if self.free != NONE && !(new && more > 0) {
            return Some(free_from(self.free));
        }
        (more > 0).then_some((len as Place, count.min(more)))
    }

    /// Puts the names of blocks into places that [`Blocks::room`] found. They are not to be found there yet.
    fn occupy(&mut self, place: Place, hashes: &[BlockHash]) {
        let (from, count) = (place as usize, hashes.len());
        let names = hashes.iter().map(|hash| hash.0);
        if from < self.sets.len() {
            for place in place..place + count as u32 {
                self.unlink(place);
            }
            for (own, name) in self.hashes[from..].iter_mut().zip(names) {
                *own = name;
            }
            return;
        }
        if from + count > self.sets.capacity() {
            // By a quarter: what is free for long is memory that nobody uses.
            let more = (from / 4).max(LEAST);
            self.hashes.reserve_exact(more);
            self.sets.reserve_exact(more);
        }
        self.hashes.extend(names);
        self.sets.resize(from + count, SetId::NOBODY);
    }

    /// Makes places free.
    fn vacate(&mut self, place: Place, count: usize) {
        let end = place as usize + count;
        if end == self.sets.len() && count > 0 {
            self.hashes.truncate(place as usize);
            self.sets.truncate(place as usize);
            return;
        }
        self.sets[place as usize..end].fill(SetId::NOBODY);
        for place in (place..place + count as u32).rev() {
            self.link(place);
        }
    }

    fn link(&mut self, place: Place) {
        self.hashes[place as usize] = links(self.free, NONE);
        if self.free != NONE {
            let (next, _) = unpack(self.hashes[self.free as usize]);
            self.hashes[self.free as usize] = links(next, place);
        }
        self.free = place;
    }

    fn unlink(&mut self, place: Place) {
        let (next, previous) = unpack(self.hashes[place as usize]);
        if previous == NONE {
            self.free = next;
        } else {
            let (_, before) = unpack(self.hashes[previous as usize]);
            self.hashes[previous as usize] = links(next, before);
        }
        if next != NONE {
            let (after, _) = unpack(self.hashes[next as usize]);
            self.hashes[next as usize] = links(after, previous);
        }
    }
}

/// The piece of the hash is from its middle: the upper bits chose the entry.
fn entry(mixed: u64, place: Place) -> u32 {
    ((mixed >> 20) as u32) << PLACE_BITS | place
}

fn links(next: u32, previous: u32) -> u64 {
    u64::from(next) << 32 | u64::from(previous)
}

fn unpack(links: u64) -> (u32, u32) {
    ((links >> 32) as u32, links as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(range: std::ops::Range<u64>) -> Vec<BlockHash> {
        crate::hash::blocks(
            BlockHash(range.start),
            &(0..(range.end - range.start) as u32).collect::<Vec<_>>(),
            1,
        )
    }

    fn fill(blocks: &mut Blocks, hashes: &[BlockHash], set: SetId) {
        let (mut previous, mut at) = (None, 0);
        while at < hashes.len() {
            let Found::Added(place, count) = blocks.find_or_add(&hashes[at..], previous, set)
            else {
                panic!("{:?} was there", hashes[at]);
            };
            previous = Some(place + count as u32 - 1);
            at += count;
        }
    }

    #[test]
    fn blocks_of_one_prefix_lie_side_by_side_also_in_places_that_were_freed_from_the_end() {
        let mut blocks = Blocks::new(5);
        let (one, two, three) = (names(0..100), names(1000..1100), names(2000..2100));
        fill(&mut blocks, &one, SetId::only(1));
        fill(&mut blocks, &two, SetId::only(1));
        assert_eq!(blocks.run(0, &one), 100);
        for hash in one.iter().rev() {
            let place = blocks.find(*hash, None).unwrap();
            blocks.free(place, 1);
        }
        fill(&mut blocks, &three, SetId::only(2));
        assert_eq!(blocks.places(), 200);
        let place = blocks.find(three[0], None).unwrap();
        assert_eq!(blocks.run(place, &three), 100);
        assert!(one.iter().all(|hash| blocks.find(*hash, None).is_none()));
        assert!(two.iter().all(|hash| blocks.find(*hash, None).is_some()));
    }

    #[test]
    fn a_run_ends_where_the_holders_change() {
        let mut blocks = Blocks::new(5);
        let hashes = names(0..40);
        fill(&mut blocks, &hashes, SetId::only(1));
        blocks.put(19, 21, SetId::only(2));
        assert_eq!(blocks.run(0, &hashes), 19);
        assert_eq!(blocks.run(19, &hashes[19..]), 21);
    }

    #[test]
    fn churn_costs_no_memory() {
        let mut blocks = Blocks::new(5);
        let keep = names(0..1000);
        fill(&mut blocks, &keep, SetId::only(1));
        for round in 1..200 {
            let come = names(round * 10_000..round * 10_000 + 500);
            fill(&mut blocks, &come, SetId::only(1));
            for hash in &come {
                let place = blocks.find(*hash, None).unwrap();
                blocks.free(place, 1);
            }
        }
        assert!(blocks.memory() <= 1500 * 32, "{}", blocks.memory());
        assert!(keep.iter().all(|hash| blocks.find(*hash, None).is_some()));
    }
}
