//! Which targets hold which blocks: exactly what they say, and who holds how much of a prompt.
//!
//! A flat map from a block's name to the set of its holders. Since a name covers everything before the block,
//! there is no tree: no parent has to be known, and blocks may come and go in any order. Targets are
//! spread over a few lanes (`lane`), each under a lock of its own, so that changes of one target wait only for those of
//! its lane, and no longer than a batch takes, but for the one that removes a lane's last block and gives its memory back;
//! a lookup asks each lane in turn.
//!
//! What makes it small and fast: blocks of one prefix lie side by side (`blocks`, `places`), each distinct
//! set of holders (`sets`) is kept once, and a target that leaves or empties its cache costs nothing at that moment
//! (`lane`). Nothing is ever made anew as a whole: the hash table grows by parts (`table`) and places by chunks.

mod blocks;
mod lane;
mod line;
mod matches;
mod places;
mod sets;
mod table;

use parking_lot::{Mutex, RwLock};

use crate::BlockHash;
use lane::Lane;

pub use matches::Matches;

/// Blocks that are changed under a lock at once: some ten microseconds of work.
const BATCH: usize = 1024;
/// Blocks that are added under a lock at once: several parts of a lane's table may double meanwhile.
const ADDED: usize = 128;
/// Lanes, unless told otherwise. Each makes lookups longer by what one lane's takes, and changes of as many
/// threads at a time possible; four threads change more than a thousand workers do.
pub const LANES: usize = 4;

/// One whose blocks are kept apart: a worker, or a data-parallel rank of one, or its blocks in one medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(u32);

impl Target {
    /// Returns its number, which is small: as many targets as there were at once have smaller ones.
    pub fn number(self) -> usize {
        self.0 as usize
    }
}

/// What an index takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub bytes: usize,
    /// Names, each counted once per lane.
    pub blocks: usize,
    /// Pairs of block and holder.
    pub held: u64,
}

/// Which targets hold which blocks. Shared by reference among threads.
#[derive(Debug)]
pub struct Index {
    lanes: Box<[RwLock<Lane>]>,
    numbers: Mutex<Numbers>,
}

#[derive(Debug, Default)]
struct Numbers {
    next: u32,
    free: Vec<u32>,
}

impl Index {
    /// Returns an empty index.
    ///
    /// - `lanes`: not zero; [`LANES`] is a good number.
    /// - `seed`: random, and unknown to clients.
    pub fn new(lanes: usize, seed: u64) -> Self {
        let lane = |lane: usize| RwLock::new(Lane::new(seed.wrapping_add(lane as u64)));
        Self {
            lanes: (0..lanes.max(1)).map(lane).collect(),
            numbers: Mutex::default(),
        }
    }

    /// Takes in a target.
    pub fn join(&self) -> Target {
        let target = self.number();
        self.enter(target, target);
        target
    }

    /// Takes in a target whose blocks lookups report as those of `owner`, the longer match of the two.
    pub fn join_for(&self, owner: Target) -> Target {
        let target = self.number();
        self.enter(target, owner);
        target
    }

    /// Takes in a target under the number that another index gave it. Such an index gives no numbers itself.
    pub(crate) fn join_as(&self, target: Target) {
        self.enter(target, target);
    }

    /// Forgets a target that joined under another index's number.
    pub(crate) fn dismiss(&self, target: Target) {
        let (lane, seat) = self.seat(target);
        lane.write().leave(seat);
    }

    /// Forgets a target and what it holds. Changes that still come for it are without effect, until another target
    /// joins, which may be given its number. Takes the same time however much it holds.
    pub fn leave(&self, target: Target) {
        self.dismiss(target);
        self.numbers.lock().free.push(target.0);
    }

    /// Notes that a target holds blocks; those that it holds already may be among them.
    ///
    /// - `hashes`: in the order of their prefix, as far as they are of one; any other order is right, and slower.
    /// - result: how many are new to it.
    pub fn insert(&self, target: Target, hashes: &[BlockHash]) -> u64 {
        let (lane, seat) = self.seat(target);
        let batches = hashes.chunks(ADDED);
        batches
            .map(|batch| lane.write().insert(seat, batch))
            .sum::<u64>()
    }

    /// Notes that a target holds blocks no longer; those that it never held may be among them.
    pub fn remove(&self, target: Target, hashes: &[BlockHash]) {
        let (lane, seat) = self.seat(target);
        for batch in hashes.chunks(BATCH) {
            lane.write().remove(seat, batch);
        }
    }

    /// Notes that a target holds nothing. What it held is cleaned up a batch at a time, with the changes that follow.
    pub fn clear(&self, target: Target) {
        let (lane, seat) = self.seat(target);
        lane.write().clear(seat);
    }

    /// Returns how many blocks a target holds.
    pub fn blocks(&self, target: Target) -> u64 {
        let (lane, seat) = self.seat(target);
        lane.read().held_blocks(seat)
    }

    /// Finds how many blocks of a prompt each target holds, from the first on without a gap.
    ///
    /// - `hashes`: of the prompt's blocks, in order.
    /// - `out`: is overwritten.
    pub fn matches(&self, hashes: &[BlockHash], out: &mut Matches) {
        out.clear();
        for lane in &self.lanes {
            lane.read().matches(hashes, out);
        }
    }

    /// Finds how many blocks of a prompt one target holds itself, from the first on without a gap; those of
    /// targets that joined for it are not counted.
    pub fn own(&self, target: Target, hashes: &[BlockHash]) -> u32 {
        let (lane, seat) = self.seat(target);
        lane.read().own(seat, hashes)
    }

    /// Lengthens the matches of targets that hold, here, what comes after them: for what lies in a slower medium.
    pub fn extend(&self, hashes: &[BlockHash], out: &mut Matches) {
        for lane in &self.lanes {
            let lane = lane.read();
            if !lane.is_empty() {
                lane.extend(hashes, out);
            }
        }
    }

    /// Cleans up what targets left behind, as changes do by themselves, a batch at a time.
    ///
    /// Returns whether anything is left to clean up.
    pub fn sweep(&self) -> bool {
        let mut left = false;
        for lane in &self.lanes {
            left |= lane.write().sweep(BATCH);
        }
        left
    }

    /// Returns what the index takes.
    pub fn memory(&self) -> Memory {
        let mut sum = Memory::default();
        for lane in &self.lanes {
            let memory = lane.read().memory();
            sum.bytes += memory.bytes;
            sum.blocks += memory.blocks;
            sum.held += memory.held;
        }
        sum
    }

    fn number(&self) -> Target {
        let mut numbers = self.numbers.lock();
        let next = numbers.next;
        Target(numbers.free.pop().unwrap_or_else(|| {
            numbers.next += 1;
            next
        }))
    }

    fn enter(&self, target: Target, owner: Target) {
        let (lane, seat) = self.seat(target);
        lane.write().join(seat, owner);
    }

    fn seat(&self, target: Target) -> (&RwLock<Lane>, usize) {
        let (number, lanes) = (target.number(), self.lanes.len());
        (&self.lanes[number % lanes], number / lanes)
    }
}
