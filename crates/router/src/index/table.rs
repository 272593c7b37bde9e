//! Where a block lies, by its name: a hash table of places.
//!
//! It knows pieces of hashes and numbers of places, and nothing of what lies there: whoever asks says whether a place
//! is the right one.
//!
//! Made of *parts*, each of a power of two of *buckets*, each of one cache line. So most questions, and all
//! entries, cost one look at memory, and since all of a line is compared at once there is no branch to guess. A part that
//! becomes full doubles by itself, so that a change waits for the few parts that its blocks fill. An entry has as many bits
//! of the hash as the place leaves, and doubling takes one of them to choose the bucket and gives it to the
//! place: so names need not be read for it.

use std::array;

use super::line::Line;

/// Number of a place.
pub(super) type Place = u32;

/// Parts, chosen by the upper bits of a hash: with twenty million blocks in four lanes one of them has 78,000.
const PARTS: usize = 64;
const PARTS_BITS: u32 = PARTS.trailing_zeros();
/// Bits of a hash that a part knows: its buckets' number and what is in the entry.
const KNOWN: u32 = 22;
/// Bits of an entry that tell the place, in a part of one bucket. With as many blocks as fill it in each part,
/// there are some eight hundred places, with a few free.
const LEAST: u32 = u32::BITS - KNOWN;
/// A part doubles no further than this, since nothing would be left of the hash.
const MOST: u32 = 20;
/// Entries of a bucket.
const SLOTS: usize = 15;
/// Entries for each bucket at which a part doubles: of buckets chosen at random by so many, one in twelve is full.
const LOAD: u32 = 10;
const EMPTY: u32 = 0;

/// Entries in any order, and last how many blocks are in later buckets because this one was full when they came. An
/// entry is the tag above and the place plus one below; of what length is the part's to say.
#[derive(Clone, Copy, Debug)]
struct Bucket(Line);

#[derive(Debug)]
struct Part {
    /// None, or a power of two.
    buckets: Box<[Bucket]>,
    /// Logarithm of their number.
    bits: u32,
    /// The bits of an entry that tell the place.
    places: u32,
    used: u32,
}

/// What a part knows of a block, and where it belongs there.
#[derive(Clone, Copy)]
struct Belongs {
    home: usize,
    tag: u32,
}

#[derive(Debug)]
pub(super) struct Table {
    parts: Box<[Part; PARTS]>,
}

/// A hash after mixing: its upper bits depend on all of it, and no client knows how.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mixed(pub(super) u64);

impl Table {
    pub(super) fn new() -> Self {
        Self {
            parts: Box::new(array::from_fn(|_| Part::new())),
        }
    }

    /// Returns the bytes that it takes.
    pub(super) fn memory(&self) -> usize {
        let parts = self.parts.iter();
        let buckets: usize = parts.map(|part| part.buckets.len()).sum();
        buckets * size_of::<Bucket>() + size_of::<[Part; PARTS]>()
    }

    /// Lets memory bring what a question after a block will need first, so that it need not be waited for.
    pub(super) fn fetch(&self, mixed: Mixed) {
        let part = &self.parts[mixed.part()];
        if let Some(bucket) = part.buckets.get(part.belongs(mixed).home) {
            bucket.0.fetch();
        }
    }

    /// Returns the place of a block.
    ///
    /// - `is`: says whether the block is at a place.
    pub(super) fn find(&self, mixed: Mixed, is: impl Fn(Place) -> bool) -> Option<Place> {
        let part = &self.parts[mixed.part()];
        part.find(part.belongs(mixed), is)
    }

    /// Returns the place of a block, or else enters it at a new one.
    ///
    /// - `mixed_at`: the name of the block at a place that was entered before.
    pub(super) fn find_or_enter(
        &mut self,
        mixed: Mixed,
        new: Place,
        is: impl Fn(Place) -> bool,
        mixed_at: impl Fn(Place) -> Mixed,
    ) -> Option<Place> {
        let part = &mut self.parts[mixed.part()];
        while !part.has_room(new) {
            part.double(&mixed_at);
        }
        // Mostly it is new, and there is room where it belongs.
        let belongs = part.belongs(mixed);
        let bucket = &mut part.buckets[belongs.home];
        let hits = bucket.hits(!part.places, belongs.tag);
        let free = bucket.hits(u32::MAX, EMPTY);
        if hits == 0 && free != 0 && bucket.passed() == 0 {
            bucket.0.0[free.trailing_zeros() as usize] = belongs.tag | (new + 1);
            part.used += 1;
            return None;
        }
        let found = part.find(belongs, is);
        if found.is_none() {
            part.enter(belongs, new);
            part.used += 1;
        }
        found
    }

    /// Forgets a block that was entered at a place.
    pub(super) fn erase(&mut self, mixed: Mixed, place: Place) {
        let part = &mut self.parts[mixed.part()];
        part.erase(part.belongs(mixed), place);
    }
}

impl Mixed {
    fn part(self) -> usize {
        (self.0 >> (u64::BITS - PARTS_BITS)) as usize
    }

    /// Returns the bits after those that chose the part.
    fn known(self) -> u32 {
        (self.0 >> (u64::BITS - PARTS_BITS - KNOWN)) as u32 & ((1 << KNOWN) - 1)
    }
}

impl Bucket {
    const EMPTY: Self = Self(Line([EMPTY; SLOTS + 1]));

    /// Returns the slots of the entries for which `entry & mask == tag`, one bit each.
    fn hits(&self, mask: u32, tag: u32) -> u32 {
        self.0.hits(mask, tag) & ((1 << SLOTS) - 1)
    }

    /// Moves what is in a bucket to the two that it becomes when its part doubles: the first bit of the tag chooses
    /// which, and the place gets one more.
    fn halve(&self, places: u32, lower: &mut Self, upper: &mut Self) {
        let mut used = [0; 2];
        for &entry in self.entries() {
            let place = entry & places;
            let moved = (entry & !places) << 1 | place;
            // Written to both and kept in one: that saves a branch.
            let [is_lower, is_upper] = [entry != EMPTY && entry >> 31 == 0, entry >> 31 != 0];
            lower.0.0[used[0]] = if is_lower { moved } else { EMPTY };
            upper.0.0[used[1]] = if is_upper { moved } else { EMPTY };
            used[0] += usize::from(is_lower);
            used[1] += usize::from(is_upper);
        }
    }

    fn entries(&self) -> &[u32] {
        &self.0.0[..SLOTS]
    }

    fn passed(&self) -> u32 {
        self.0.0[SLOTS]
    }

    fn passed_mut(&mut self) -> &mut u32 {
        &mut self.0.0[SLOTS]
    }
}

impl Part {
    fn new() -> Self {
        Self {
            buckets: Box::default(),
            bits: 0,
            places: (1 << LEAST) - 1,
            used: 0,
        }
    }

    fn belongs(&self, mixed: Mixed) -> Belongs {
        let shifted = u64::from(mixed.known()) << self.bits;
        Belongs {
            home: (shifted >> KNOWN) as usize,
            tag: (shifted as u32) << LEAST,
        }
    }

    fn find(&self, belongs: Belongs, is: impl Fn(Place) -> bool) -> Option<Place> {
        let mut at = belongs.home;
        for _ in 0..self.buckets.len() {
            let bucket = &self.buckets[at];
            let mut hits = bucket.hits(!self.places, belongs.tag);
            while hits != 0 {
                let entry = bucket.0.0[hits.trailing_zeros() as usize];
                let place = (entry & self.places).wrapping_sub(1);
                if entry != EMPTY && is(place) {
                    return Some(place);
                }
                hits &= hits - 1;
            }
            if bucket.passed() == 0 {
                break;
            }
            at = self.after(at);
        }
        None
    }

    fn has_room(&self, place: Place) -> bool {
        self.bits == MOST || self.used < self.buckets.len() as u32 * LOAD && place < self.places
    }

    fn enter(&mut self, belongs: Belongs, place: Place) {
        let entry = belongs.tag | (place + 1);
        let mut at = belongs.home;
        loop {
            let bucket = &mut self.buckets[at];
            let free = bucket.hits(u32::MAX, EMPTY);
            if free != 0 {
                bucket.0.0[free.trailing_zeros() as usize] = entry;
                return;
            }
            *bucket.passed_mut() += 1;
            at = self.after(at);
        }
    }

    fn erase(&mut self, belongs: Belongs, place: Place) {
        let entry = belongs.tag | (place + 1);
        let mut at = belongs.home;
        loop {
            let bucket = &mut self.buckets[at];
            let hits = bucket.hits(u32::MAX, entry);
            if hits != 0 {
                bucket.0.0[hits.trailing_zeros() as usize] = EMPTY;
                self.used -= 1;
                return;
            }
            *bucket.passed_mut() -= 1;
            at = self.after(at);
        }
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.buckets.len() - 1)
    }

    #[cold]
    fn double(&mut self, mixed_at: impl Fn(Place) -> Mixed) {
        let old = std::mem::take(&mut self.buckets);
        let Some(last) = old.last() else {
            self.buckets = Box::new([Bucket::EMPTY]);
            return;
        };
        let places = self.places;
        (self.bits, self.places) = (self.bits + 1, places << 1 | 1);
        let mut buckets = Vec::with_capacity(old.len() * 2);
        let mut strays = Vec::new();
        // Where nobody went past the bucket before, all that is in a bucket belongs there.
        let mut passed = last.passed();
        for bucket in &old {
            buckets.extend([Bucket::EMPTY; 2]);
            if passed != 0 {
                let entries = bucket.entries().iter();
                strays.extend(entries.filter_map(|entry| (entry & places).checked_sub(1)));
            } else if let [.., lower, upper] = &mut buckets[..] {
                bucket.halve(places, lower, upper);
            }
            passed = bucket.passed();
        }
        self.buckets = buckets.into_boxed_slice();
        for place in strays {
            self.enter(self.belongs(mixed_at(place)), place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// Names that meet in few buckets, however often those are doubled, and some that do not.
    fn name(number: usize) -> Mixed {
        let number = number as u64;
        let crowd = [0, 1 << 36, u64::MAX << 36, 0x5555 << 44][number as usize % 4];
        match number % 8 {
            0..4 => Mixed(crowd ^ number),
            _ => Mixed(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        }
    }

    #[derive(Clone, Debug)]
    enum Change {
        Enter(std::ops::Range<usize>),
        Erase(std::ops::Range<usize>),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let range = (0..600_usize, 1..200_usize).prop_map(|(from, count)| from..from + count);
        let change = (range, any::<bool>()).prop_map(|(range, enter)| match enter {
            true => Change::Enter(range),
            false => Change::Erase(range),
        });
        prop::collection::vec(change, 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Places are far apart in some runs, which doubles parts that are not full.
        #[test]
        fn whatever_comes_and_goes_the_table_finds_what_is_there(changes in changes(), far in 1..60_u32) {
            let mut table = Table::new();
            let mut there = HashMap::<usize, Place>::new();
            let mut at = HashMap::<Place, usize>::new();
            let mut next = 0;
            for change in changes {
                match change {
                    Change::Enter(numbers) => for number in numbers {
                        let found = table.find_or_enter(
                            name(number),
                            next,
                            |place| at.get(&place) == Some(&number),
                            |place| name(at[&place]),
                        );
                        prop_assert_eq!(found, there.get(&number).copied());
                        if found.is_none() {
                            there.insert(number, next);
                            at.insert(next, number);
                            next += far;
                        }
                    },
                    Change::Erase(numbers) => for number in numbers {
                        if let Some(place) = there.remove(&number) {
                            table.erase(name(number), place);
                            at.remove(&place);
                        }
                    },
                }
                for number in (0..800).step_by(7) {
                    let found = table.find(name(number), |place| at.get(&place) == Some(&number));
                    prop_assert_eq!(found, there.get(&number).copied());
                }
            }
            let used: u32 = table.parts.iter().map(|part| part.used).sum();
            prop_assert_eq!(used as usize, there.len());
        }
    }

    #[test]
    fn what_is_empty_again_asks_no_bucket_more_than_its_own() {
        let mut table = Table::new();
        let crowd: Vec<_> = (0..100).map(Mixed).collect();
        for (place, &mixed) in (0..).zip(&crowd) {
            let at = |place: Place| crowd[place as usize];
            table.find_or_enter(mixed, place, |_| false, at);
        }
        for (place, &mixed) in (0..).zip(&crowd) {
            table.erase(mixed, place);
        }
        let buckets = table.parts.iter().flat_map(|part| part.buckets.iter());
        assert!(buckets.flat_map(|bucket| bucket.0.0).all(|word| word == 0));
    }
}
