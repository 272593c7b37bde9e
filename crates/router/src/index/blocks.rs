//! Blocks by name: where each one lies, and which set of holders it has.
//!
//! Blocks that were inserted together lie side by side, in the order of their prefix (`places`). So a prompt is looked up
//! by one question to the hash table (`table`) for its first block; the others are mostly found by comparing memory.
//! Neighbourhood is only a guess, which the comparison checks: whatever it misses is asked of the table.
//!
//! A block costs 12 bytes here (name and set), an eighth more where places are free, and 6 to 13 in the table. Places and
//! table keep the largest size that they had, until the last block goes.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::places::Places;
use super::sets::SetId;
pub(super) use super::table::Place;
use super::table::{Mixed, Table};
use crate::BlockHash;

/// Blocks that are added at once. What is already here among them ends that, and what was prepared for the others is undone.
const TOGETHER: usize = 64;
/// Blocks whose table entries memory is asked for ahead of time: processors wait for about so many lines at once.
const AHEAD: usize = 16;

#[derive(Debug)]
pub(super) struct Blocks {
    places: Places,
    table: Table,
    live: usize,
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
            places: Places::new(),
            table: Table::new(),
            live: 0,
            // Odd, so that no two hashes are mixed into one.
            key: xxh3_64_with_seed(b"blocks", seed) | 1,
        }
    }

    /// Returns how many blocks there are.
    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Returns where they lie.
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Returns the bytes that all of it takes.
    pub(super) fn memory(&self) -> usize {
        self.places.memory() + self.table.memory()
    }

    /// Changes the holders of `count` blocks that lie side by side.
    pub(super) fn put(&mut self, place: Place, count: usize, set: SetId) {
        self.places.put(place, count, set);
    }

    /// Finds a block: at `guess` if it lies there, else by the table.
    pub(super) fn find(&self, hash: BlockHash, guess: Option<Place>) -> Option<Place> {
        match guess {
            Some(guess) if self.places.holds(guess, hash) => Some(guess),
            Some(_) | None => self.search(hash),
        }
    }

    /// Lets memory bring what questions after the first of some blocks will need.
    pub(super) fn fetch(&self, hashes: &[BlockHash]) {
        for &hash in hashes.iter().take(AHEAD) {
            self.table.fetch(mix(self.key, hash));
        }
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
        if let Some(previous) = previous
            && self.places.holds(previous + 1, hashes[0])
        {
            return Found::There(previous + 1);
        }
        let hashes = &hashes[..hashes.len().min(TOGETHER)];
        self.fetch(hashes);
        match self.search(hashes[0]) {
            Some(place) => Found::There(place),
            None => self.add(hashes, previous, set),
        }
    }

    /// Removes `count` blocks that lie side by side.
    pub(super) fn free(&mut self, place: Place, count: usize) {
        self.live -= count;
        if self.live == 0 {
            *self = Self::new(self.key);
            return;
        }
        let names = self.places.names(place, count);
        let key = self.key;
        let mixed = |name: &u64| mix(key, BlockHash(*name));
        for ahead in names.iter().take(AHEAD) {
            self.table.fetch(mixed(ahead));
        }
        for (at, name) in names.iter().enumerate() {
            if let Some(ahead) = names.get(at + AHEAD) {
                self.table.fetch(mixed(ahead));
            }
            self.table.erase(mixed(name), place + at as u32);
        }
        self.places.vacate(place, count);
    }

    /// Adds a block that is not here after the one before it, and what comes after it, as far as that is new.
    fn add(&mut self, hashes: &[BlockHash], previous: Option<Place>, set: SetId) -> Found {
        let Some((place, count)) = self.places.room(previous, hashes.len(), self.live) else {
            return Found::Full;
        };
        let hashes = &hashes[..count];
        self.places.occupy(place, hashes);
        let mut added = 0;
        for (at, &hash) in hashes.iter().enumerate() {
            if let Some(&ahead) = hashes.get(at + AHEAD) {
                self.table.fetch(mix(self.key, ahead));
            }
            let (places, key) = (&self.places, self.key);
            let found = self.table.find_or_enter(
                mix(key, hash),
                place + added as u32,
                |place| places.is(place, hash),
                |place| mix(key, places.name(place)),
            );
            if found.is_some() {
                break;
            }
            added += 1;
        }
        self.places.put(place, added, set);
        self.places.vacate(place + added as u32, count - added);
        self.live += added;
        Found::Added(place, added)
    }

    fn search(&self, hash: BlockHash) -> Option<Place> {
        let mixed = mix(self.key, hash);
        self.table.find(mixed, |place| self.places.is(place, hash))
    }
}

fn mix(key: u64, hash: BlockHash) -> Mixed {
    Mixed(hash.0.wrapping_mul(key))
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
        assert_eq!(blocks.places().run(0, &one), 100);
        for hash in one.iter().rev() {
            let place = blocks.find(*hash, None).unwrap();
            blocks.free(place, 1);
        }
        fill(&mut blocks, &three, SetId::only(2));
        assert_eq!(blocks.places().len(), 200);
        let place = blocks.find(three[0], None).unwrap();
        assert_eq!(blocks.places().run(place, &three), 100);
        assert!(one.iter().all(|hash| blocks.find(*hash, None).is_none()));
        assert!(two.iter().all(|hash| blocks.find(*hash, None).is_some()));
    }

    #[test]
    fn a_run_ends_where_the_holders_change() {
        let mut blocks = Blocks::new(5);
        let hashes = names(0..40);
        fill(&mut blocks, &hashes, SetId::only(1));
        blocks.put(19, 21, SetId::only(2));
        assert_eq!(blocks.places().run(0, &hashes), 19);
        assert_eq!(blocks.places().run(19, &hashes[19..]), 21);
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
