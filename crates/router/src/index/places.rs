//! What lies where: the names and holders of blocks, and the list of free places.
//!
//! Blocks that were inserted together lie side by side, in the order of their prefix, as far as there is room. Nothing
//! here knows where to look for a name.

use super::sets::SetId;
use super::table::Place;
use crate::BlockHash;

/// Places that are allocated together. So more of them never moves those that are there, which would stop everybody for
/// long, nor takes more than is needed. Neighbours across the border are not looked at as such.
const CHUNK: usize = 1024;
/// Blocks at most: 67 million, more than the GPU memory of a thousand workers holds.
const MOST: usize = 1 << 26;
/// The end of the list of free places.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Chunk {
    /// Of a free place the neighbours in the list of free places: next, previous.
    names: Box<[u64; CHUNK]>,
    /// [`SetId::NOBODY`] marks a free place, or one beyond the last.
    sets: Box<[SetId; CHUNK]>,
}

#[derive(Debug)]
pub(super) struct Places {
    chunks: Vec<Chunk>,
    /// Places that are taken or in the list of free ones.
    len: usize,
    free: u32,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            len: 0,
            free: NONE,
        }
    }

    /// Returns how many places there are, free ones included.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the bytes that all of it takes.
    pub(super) fn memory(&self) -> usize {
        self.chunks.len() * CHUNK * (size_of::<u64>() + size_of::<SetId>())
            + self.chunks.capacity() * size_of::<Chunk>()
    }

    /// Returns the holders of the block at a place.
    pub(super) fn set(&self, place: Place) -> SetId {
        let (chunk, at) = split(place);
        self.chunks[chunk].sets[at]
    }

    /// Returns the name of the block at a place.
    pub(super) fn name(&self, place: Place) -> BlockHash {
        BlockHash(self.names(place, 1)[0])
    }

    /// Returns the names of `count` blocks that lie side by side.
    pub(super) fn names(&self, place: Place, count: usize) -> &[u64] {
        let (chunk, at) = split(place);
        &self.chunks[chunk].names[at..at + count]
    }

    /// Says whether a block has the name of what is at a place, which is a block or beyond the last.
    pub(super) fn is(&self, place: Place, hash: BlockHash) -> bool {
        let (chunk, at) = split(place);
        let chunk = self.chunks.get(chunk);
        chunk.is_some_and(|chunk| chunk.names[at] == hash.0)
    }

    /// Says whether a block is at a place, which may be any.
    pub(super) fn holds(&self, place: Place, hash: BlockHash) -> bool {
        let (chunk, at) = split(place);
        let chunk = self.chunks.get(chunk);
        chunk.is_some_and(|chunk| chunk.names[at] == hash.0 && chunk.sets[at] != SetId::NOBODY)
    }

    /// Changes the holders of `count` blocks that lie side by side.
    pub(super) fn put(&mut self, place: Place, count: usize, set: SetId) {
        let (chunk, at) = split(place);
        self.chunks[chunk].sets[at..at + count].fill(set);
    }

    /// Returns how many of `hashes` lie side by side from `place` on with the same holders as the block there, at least
    /// one: the block at `place` is the first.
    pub(super) fn run(&self, place: Place, hashes: &[BlockHash]) -> usize {
        let (chunk, from) = split(place);
        let chunk = &self.chunks[chunk];
        let most = hashes.len().min(CHUNK - from);
        let names = &chunk.names[from..from + most];
        let sets = &chunk.sets[from..from + most];
        let set = sets[0];
        let mut at = 0;
        while alike::<32>(&names[at..], &sets[at..], &hashes[at..], set) {
            at += 32;
        }
        while alike::<8>(&names[at..], &sets[at..], &hashes[at..], set) {
            at += 8;
        }
        while at < most && names[at] == hashes[at].0 && sets[at] == set {
            at += 1;
        }
        at.max(1)
    }

    /// Does what [`Places::run`] does, downwards from `place`: for blocks that are given from the end of their prefix.
    pub(super) fn run_down(&self, place: Place, hashes: &[BlockHash]) -> usize {
        let (chunk, from) = split(place);
        let chunk = &self.chunks[chunk];
        let set = chunk.sets[from];
        let below = (0..=from).rev().zip(hashes);
        let same =
            below.take_while(|(at, hash)| chunk.names[*at] == hash.0 && chunk.sets[*at] == set);
        same.count().max(1)
    }

    /// Returns how many places side by side end below `end` with the same holders as the last of them, at most `count`.
    pub(super) fn alike_below(&self, end: usize, count: usize) -> usize {
        let (chunk, last) = split(end as Place - 1);
        let sets = &self.chunks[chunk].sets[..=last];
        let alike = sets.iter().rev().take(count);
        alike.take_while(|set| **set == sets[last]).count()
    }

    /// Finds free places side by side, for at most `count` blocks and at least one; after `previous` if possible.
    ///
    /// - `live`: how many places are taken.
    pub(super) fn room(
        &self,
        previous: Option<Place>,
        count: usize,
        live: usize,
    ) -> Option<(Place, usize)> {
        let after = previous.map_or(NONE, |previous| previous + 1);
        if (after as usize) < self.len && self.set(after) == SetId::NOBODY {
            return Some((after, self.free_from(after, count)));
        }
        // New places keep a prefix together, which is worth an eighth of the memory.
        let more = (MOST - self.len).min(CHUNK - self.len % CHUNK);
        let new = after as usize == self.len && (self.len - live) * 8 < live;
        if self.free != NONE && !(new && more > 0) {
            return Some((self.free, self.free_from(self.free, count)));
        }
        (more > 0).then_some((self.len as Place, count.min(more)))
    }

    /// Puts the names of blocks into places that [`Places::room`] found. They have no holders yet.
    pub(super) fn occupy(&mut self, place: Place, hashes: &[BlockHash]) {
        let count = hashes.len();
        if (place as usize) < self.len {
            self.unlink(place, count);
        } else {
            self.len += count;
        }
        let (chunk, at) = split(place);
        if chunk == self.chunks.len() {
            self.chunks.push(Chunk {
                names: Box::new([0; CHUNK]),
                sets: Box::new([SetId::NOBODY; CHUNK]),
            });
        }
        let names = &mut self.chunks[chunk].names[at..at + count];
        for (name, hash) in names.iter_mut().zip(hashes) {
            *name = hash.0;
        }
    }

    /// Makes places free.
    pub(super) fn vacate(&mut self, place: Place, count: usize) {
        if count == 0 {
            return;
        }
        self.put(place, count, SetId::NOBODY);
        if place as usize + count == self.len {
            self.len = place as usize;
            // One is kept for what comes next.
            self.chunks.truncate(self.len / CHUNK + 2);
            return;
        }
        self.link(place, count);
    }

    fn free_from(&self, place: Place, count: usize) -> usize {
        let (chunk, at) = split(place);
        let most = CHUNK.min(at + self.len - place as usize);
        let sets = self.chunks[chunk].sets[at..most].iter().take(count);
        sets.take_while(|set| **set == SetId::NOBODY).count()
    }

    /// Puts places side by side, in their order, before all others in the list of free ones.
    fn link(&mut self, place: Place, count: usize) {
        let (free, last) = (self.free, place + count as u32 - 1);
        for own in place..=last {
            let next = if own == last { free } else { own + 1 };
            let previous = if own == place { NONE } else { own - 1 };
            *self.links(own) = pack(next, previous);
        }
        if free != NONE {
            let (next, _) = unpack(*self.links(free));
            *self.links(free) = pack(next, last);
        }
        self.free = place;
    }

    /// Takes places side by side out of the list of free ones: those that it has in this order, at once.
    fn unlink(&mut self, place: Place, count: usize) {
        let end = place + count as u32;
        let mut first = place;
        while first < end {
            let (mut next, previous) = unpack(*self.links(first));
            let mut last = first;
            while next == last + 1 && next < end {
                last = next;
                (next, _) = unpack(*self.links(last));
            }
            if previous == NONE {
                self.free = next;
            } else {
                let (_, before) = unpack(*self.links(previous));
                *self.links(previous) = pack(next, before);
            }
            if next != NONE {
                let (after, _) = unpack(*self.links(next));
                *self.links(next) = pack(after, previous);
            }
            first = last + 1;
        }
    }

    fn links(&mut self, place: Place) -> &mut u64 {
        let (chunk, at) = split(place);
        &mut self.chunks[chunk].names[at]
    }
}

/// Says whether the next `N` places have these names, and all of them this set. Without a branch for each: the compiler
/// makes vector instructions of it.
fn alike<const N: usize>(names: &[u64], sets: &[SetId], hashes: &[BlockHash], set: SetId) -> bool {
    let (Some(names), Some(sets)) = (names.first_chunk::<N>(), sets.first_chunk::<N>()) else {
        return false;
    };
    let Some(hashes) = hashes.first_chunk::<N>() else {
        return false;
    };
    let (mut renamed, mut moved) = (0, 0);
    for (name, hash) in names.iter().zip(hashes) {
        renamed |= name ^ hash.0;
    }
    for own in sets {
        moved |= own.0 ^ set.0;
    }
    renamed | u64::from(moved) == 0
}

/// Returns the chunk, and where in it.
fn split(place: Place) -> (usize, usize) {
    (place as usize / CHUNK, place as usize % CHUNK)
}

fn pack(next: u32, previous: u32) -> u64 {
    u64::from(next) << 32 | u64::from(previous)
}

fn unpack(links: u64) -> (u32, u32) {
    ((links >> 32) as u32, links as u32)
}
