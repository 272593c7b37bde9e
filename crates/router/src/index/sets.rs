//! Sets of holders, each kept once however many blocks have it.
//!
//! Blocks of one prefix mostly have the same holders, so the sets are far fewer than the blocks. A set of one is its
//! holder's number and is kept nowhere. A set is found by the exclusive or of its members' random marks, which
//! changes by one mark when a member comes or goes; that two sets of 64 such bits meet is as likely as that
//! two prefixes have the same name.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A holder, as a lane counts them.
pub(super) type Holder = u32;

/// Which set: one holder, or an entry of [`Sets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SetId(pub(super) u32);

/// Says that the rest of a [`SetId`] is the one holder.
const ONLY: u32 = 1 << 31;

impl SetId {
    /// The empty set.
    pub(super) const NOBODY: Self = Self(0);

    /// The set of one.
    pub(super) fn only(holder: Holder) -> Self {
        Self(holder | ONLY)
    }

    /// Returns the member of a set of one.
    pub(super) fn single(self) -> Option<Holder> {
        (self.0 & ONLY != 0).then_some(self.0 & !ONLY)
    }
}

/// Marks are random already.
#[derive(Clone, Copy, Debug, Default)]
struct Marked(u64);

impl Hasher for Marked {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only marks are hashed")
    }

    fn write_u64(&mut self, mark: u64) {
        self.0 = mark;
    }
}

#[derive(Debug, Default)]
struct Set {
    /// Ascending; at least two, or none of an entry that is free.
    members: SmallVec<[Holder; 4]>,
    mark: u64,
    /// Blocks that have it.
    blocks: u32,
}

/// All sets of more than one holder.
#[derive(Debug)]
pub(super) struct Sets {
    /// The first is never used: its number is that of the empty set.
    sets: Vec<Set>,
    free: Vec<u32>,
    by_mark: HashMap<u64, u32, BuildHasherDefault<Marked>>,
    seed: u64,
}

impl Sets {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            sets: vec![Set::default()],
            free: Vec::new(),
            by_mark: HashMap::default(),
            seed,
        }
    }

    /// Returns how many sets of more than one there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_mark.len()
    }

    /// Returns the bytes that all of it takes.
    pub(super) fn memory(&self) -> usize {
        let members = self.sets.iter().filter(|set| set.members.spilled());
        self.sets.capacity() * size_of::<Set>()
            + members
                .map(|set| set.members.capacity() * size_of::<Holder>())
                .sum::<usize>()
            + self.by_mark.capacity() * (size_of::<(u64, u32)>() + 1)
            + self.free.capacity() * size_of::<u32>()
    }

    /// Calls `with` with the members, ascending.
    pub(super) fn members<T>(&self, set: SetId, with: impl FnOnce(&[Holder]) -> T) -> T {
        match set.single() {
            Some(holder) => with(&[holder]),
            None => with(&self.sets[set.0 as usize].members),
        }
    }

    /// Says whether a holder is a member.
    pub(super) fn contains(&self, set: SetId, holder: Holder) -> bool {
        self.members(set, |members| members.binary_search(&holder).is_ok())
    }

    /// Returns the set with one more member, which was none. No block has it yet.
    pub(super) fn with(&mut self, set: SetId, holder: Holder) -> SetId {
        if set == SetId::NOBODY {
            return SetId::only(holder);
        }
        let mark = self.mark(set) ^ self.mark_of(holder);
        self.find(mark, || {
            self.members(set, |members| {
                let at = members.partition_point(|&member| member < holder);
                let mut more = SmallVec::with_capacity(members.len() + 1);
                more.extend_from_slice(&members[..at]);
                more.push(holder);
                more.extend_from_slice(&members[at..]);
                more
            })
        })
        .unwrap_or_else(|set| self.enter(set))
    }

    /// Returns the set without one of its members. No block has it yet.
    pub(super) fn without(&mut self, set: SetId, holder: Holder) -> SetId {
        if set.single().is_some() {
            return SetId::NOBODY;
        }
        let members = &self.sets[set.0 as usize].members;
        if let [one, other] = members[..] {
            return SetId::only(if one == holder { other } else { one });
        }
        let mark = self.mark(set) ^ self.mark_of(holder);
        self.find(mark, || {
            let others = members.iter().filter(|&&member| member != holder);
            others.copied().collect()
        })
        .unwrap_or_else(|set| self.enter(set))
    }

    /// Notes that `count` blocks went from one set to another. A set that no block has is forgotten.
    pub(super) fn moved(&mut self, from: SetId, to: SetId, count: usize) {
        let count = count as u32;
        if to != SetId::NOBODY && to.single().is_none() {
            self.sets[to.0 as usize].blocks += count;
        }
        if from != SetId::NOBODY && from.single().is_none() {
            let set = &mut self.sets[from.0 as usize];
            set.blocks -= count;
            if set.blocks == 0 {
                self.by_mark.remove(&set.mark);
                *set = Set::default();
                self.free.push(from.0);
            }
        }
    }

    fn mark(&self, set: SetId) -> u64 {
        match set.single() {
            Some(holder) => self.mark_of(holder),
            None => self.sets[set.0 as usize].mark,
        }
    }

    fn mark_of(&self, holder: Holder) -> u64 {
        xxh3_64_with_seed(&holder.to_le_bytes(), self.seed)
    }

    /// Returns the set with a mark, or what has to be entered.
    fn find(
        &self,
        mark: u64,
        members: impl FnOnce() -> SmallVec<[Holder; 4]>,
    ) -> Result<SetId, Set> {
        match self.by_mark.get(&mark) {
            Some(&number) => Ok(SetId(number)),
            None => Err(Set {
                members: members(),
                mark,
                blocks: 0,
            }),
        }
    }

    fn enter(&mut self, set: Set) -> SetId {
        let mark = set.mark;
        let number = match self.free.pop() {
            Some(number) => {
                self.sets[number as usize] = set;
                number
            }
            None => {
                self.sets.push(set);
                (self.sets.len() - 1) as u32
            }
        };
        self.by_mark.insert(mark, number);
        SetId(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_are_one_however_they_came_about() {
        let mut sets = Sets::new(7);
        let one = sets.with(SetId::only(1), 2);
        sets.moved(SetId::only(1), one, 1);
        let one = sets.with(one, 3);
        sets.moved(SetId(1), one, 1);
        let two = sets.with(SetId::only(3), 1);
        sets.moved(SetId::only(3), two, 1);
        let three = sets.with(two, 2);
        sets.moved(two, three, 1);
        assert_eq!(one, three);
        assert_eq!(sets.len(), 1);
        sets.members(one, |members| assert_eq!(members, [1, 2, 3]));
    }

    #[test]
    fn a_set_that_no_block_has_is_forgotten() {
        let mut sets = Sets::new(7);
        let both = sets.with(SetId::only(1), 2);
        sets.moved(SetId::only(1), both, 5);
        assert_eq!(sets.without(both, 1), SetId::only(2));
        sets.moved(both, SetId::only(2), 5);
        assert_eq!(sets.len(), 0);
        assert_eq!(sets.without(SetId::only(2), 2), SetId::NOBODY);
    }
}
