//! What the caches of one model's workers hold, wherever that is known from.
//!
//! One [`Caches`] per model. A target either tells what it holds ([`Caches::exact`]: stored, removed, cleared, per
//! [`Medium`]), or it is learned from what is sent there. A target that tells is also believed to hold
//! soon what was just sent to it: an engine tells of a prompt only when it is computed, and prompts that
//! share a prefix come in bursts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
pub use stator_common::events::Medium;

use crate::BlockHash;
use crate::approx::{Bound, Learned};
use crate::index::{Index, LANES, Matches, Memory, Target};

/// All media, the fastest first.
const MEDIA: [Medium; 3] = [Medium::Gpu, Medium::Cpu, Medium::Storage];

/// How long a target that tells what it holds is believed to hold what was sent to it without having said so: as long as
/// a long prompt waits and is computed.
const SOON: Duration = Duration::from_secs(10);
/// How long a target that tells nothing is believed to hold what was sent to it (as in Dynamo 1.6).
const TTL: Duration = Duration::from_secs(120);

/// Batches of what left targets behind that are cleaned up in a second, besides those that changes clean up: a
/// millisecond of work.
const BATCHES: usize = 64;

/// How much more than its cache's blocks is learned of a target that tells nothing: what is used often is kept in
/// several slices and counted in each, so that without this less would be believed to be there than is. In simulated
/// fleets twice as much is best or close to it (docs/benchmarks/router.md).
const SLICED: u64 = 2;

/// Where knowledge of a target's cache comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The target tells.
    Told,
    /// What was sent to it.
    Learned,
}

/// What the caches of one model's workers hold.
#[derive(Debug)]
pub struct Caches {
    device: Index,
    /// By [`Medium`], without the device's own.
    lower: [Lower; 2],
    /// By target number.
    members: Mutex<Vec<Option<Member>>>,
}

#[derive(Debug)]
struct Lower {
    index: Index,
    /// Whether anything was ever stored there.
    used: AtomicBool,
}

#[derive(Debug)]
struct Member {
    source: Source,
    /// Blocks of its cache.
    blocks: u64,
    learned: Learned,
}

/// How much of a prompt each target holds. Used again for the next lookup.
#[derive(Clone, Debug, Default)]
pub struct Overlaps {
    /// Up to and with each medium.
    media: [Matches; 3],
}

/// How many blocks of a prompt one target holds, from the first on without a gap; each where it is fastest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// In the memory that the engine computes with.
    pub device: u32,
    /// After these, in the host's memory.
    pub host: u32,
    /// After these, further away.
    pub storage: u32,
}

impl Overlaps {
    /// Returns what a target holds.
    pub fn of(&self, target: Target) -> Overlap {
        let [device, host, storage] = [0, 1, 2].map(|at| self.media[at].blocks(target));
        Overlap {
            device,
            host: host - device,
            storage: storage - host,
        }
    }
}

impl Caches {
    /// Returns caches without targets.
    ///
    /// - `seed`: random, and unknown to clients.
    pub fn new(seed: u64) -> Self {
        let lower = || Lower {
            index: Index::new(LANES, seed),
            used: AtomicBool::new(false),
        };
        Self {
            device: Index::new(LANES, seed),
            lower: [lower(), lower()],
            members: Mutex::default(),
        }
    }

    /// Takes in a target.
    ///
    /// - `blocks`: of its cache.
    pub fn join(&self, source: Source, blocks: u64) -> Target {
        let target = self.device.join();
        for lower in &self.lower {
            lower.index.join_as(target);
        }
        let mut members = self.members.lock();
        if members.len() <= target.number() {
            members.resize_with(target.number() + 1, || None);
        }
        members[target.number()] = Some(Member::new(target, source, blocks));
        target
    }

    /// Forgets a target and what it holds.
    pub fn leave(&self, target: Target) {
        if let Some(mut member) = self.member(target, Option::take) {
            member.learned.clear(&self.device);
        }
        for lower in &self.lower {
            lower.index.dismiss(target);
        }
        self.device.leave(target);
    }

    /// Returns where knowledge of a target comes from.
    pub fn source(&self, target: Target) -> Option<Source> {
        self.member(target, |member| member.as_ref().map(|member| member.source))
    }

    /// Says where knowledge of a target comes from now on. What was known is forgotten if that changes.
    pub fn turn(&self, target: Target, source: Source) {
        let changed = self.member(target, |member| match member {
            Some(member) if member.source != source => {
                member.learned.clear(&self.device);
                *member = Member::new(target, source, member.blocks);
                true
            }
            Some(_) | None => false,
        });
        if changed {
            for medium in MEDIA {
                self.exact(medium).clear(target);
            }
        }
    }

    /// Returns the index that a target's own word goes into.
    pub fn exact(&self, medium: Medium) -> &Index {
        match medium {
            Medium::Gpu => &self.device,
            Medium::Cpu => &self.lower[0].index,
            Medium::Storage => &self.lower[1].index,
        }
    }

    /// Notes that a target says that it holds blocks.
    pub fn stored(&self, target: Target, medium: Medium, hashes: &[BlockHash]) {
        match medium {
            Medium::Gpu => {}
            Medium::Cpu => self.lower[0].used.store(true, Ordering::Relaxed),
            Medium::Storage => self.lower[1].used.store(true, Ordering::Relaxed),
        }
        self.exact(medium).insert(target, hashes);
    }

    /// Notes that a target says that it holds blocks no longer.
    pub fn removed(&self, target: Target, medium: Medium, hashes: &[BlockHash]) {
        self.exact(medium).remove(target, hashes);
    }

    /// Notes that a target says that it holds nothing, in one medium or in none.
    ///
    /// What was just sent to it may have been computed before: that is forgotten, too.
    pub fn cleared(&self, target: Target, medium: Option<Medium>) {
        for one in MEDIA {
            if medium.is_none_or(|medium| medium == one) {
                self.exact(one).clear(target);
            }
        }
        if medium.is_none_or(|medium| medium == Medium::Gpu) {
            self.member(target, |member| {
                if let Some(member) = member {
                    member.learned.clear(&self.device);
                }
            });
        }
    }

    /// Notes that a prompt is sent to a target.
    ///
    /// - `hashes`: of all its blocks.
    /// - `now`: since any fixed moment, the same for all calls.
    pub fn sent(&self, target: Target, hashes: &[BlockHash], now: Duration) {
        self.member(target, |member| {
            if let Some(member) = member {
                member.learned.learn(&self.device, hashes, now);
            }
        });
    }

    /// Forgets what was sent too long ago. To be called about once a second.
    pub fn expire(&self, now: Duration) {
        for member in self.members.lock().iter_mut().flatten() {
            member.learned.expire(&self.device, now);
        }
        for medium in MEDIA {
            for _ in 0..BATCHES {
                if !self.exact(medium).sweep() {
                    break;
                }
            }
        }
    }

    /// Finds how much of a prompt each target holds.
    ///
    /// - `hashes`: of the blocks that a cache could save: an engine always computes the last token.
    /// - `out`: is overwritten.
    pub fn overlaps(&self, hashes: &[BlockHash], out: &mut Overlaps) {
        let [device, host, storage] = &mut out.media;
        self.device.matches(hashes, device);
        self.lower[0].extend(hashes, device, host);
        self.lower[1].extend(hashes, host, storage);
    }

    /// Finds how many blocks of a prompt one target has said that it holds on its device; what was only sent
    /// to it is not counted.
    pub fn told(&self, target: Target, hashes: &[BlockHash]) -> u32 {
        self.device.own(target, hashes)
    }

    /// Returns how many blocks a target holds in a medium, as far as is known.
    pub fn blocks(&self, target: Target, medium: Medium) -> u64 {
        let told = self.exact(medium).blocks(target);
        if medium != Medium::Gpu {
            return told;
        }
        self.member(target, |member| match member {
            Some(member) if member.source == Source::Learned => member.learned.blocks(),
            Some(_) | None => told,
        })
    }

    /// Returns what all of it takes.
    pub fn memory(&self) -> Memory {
        let indices = MEDIA.map(|medium| self.exact(medium).memory());
        indices
            .into_iter()
            .fold(Memory::default(), |sum, one| Memory {
                bytes: sum.bytes + one.bytes,
                blocks: sum.blocks + one.blocks,
                held: sum.held + one.held,
            })
    }

    fn member<T>(&self, target: Target, with: impl FnOnce(&mut Option<Member>) -> T) -> T {
        match self.members.lock().get_mut(target.number()) {
            Some(member) => with(member),
            None => with(&mut None),
        }
    }
}

impl Lower {
    fn extend(&self, hashes: &[BlockHash], faster: &Matches, out: &mut Matches) {
        out.copy(faster);
        if self.used.load(Ordering::Relaxed) {
            self.index.extend(hashes, out);
        }
    }
}

impl Member {
    fn new(target: Target, source: Source, blocks: u64) -> Self {
        let bound = match source {
            Source::Told => Bound { ttl: SOON, blocks },
            Source::Learned => Bound {
                ttl: TTL,
                blocks: blocks.saturating_mul(SLICED),
            },
        };
        Self {
            source,
            blocks,
            learned: Learned::new(target, bound),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash;

    fn prompt(n: u32) -> Vec<BlockHash> {
        let tokens: Vec<u32> = (0..40).map(|at| n << 16 | at).collect();
        hash::blocks(hash::root("", ""), &tokens, 2)
    }

    fn overlap(caches: &Caches, target: Target, hashes: &[BlockHash]) -> Overlap {
        let mut overlaps = Overlaps::default();
        caches.overlaps(hashes, &mut overlaps);
        overlaps.of(target)
    }

    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn each_block_counts_where_it_is_fastest() {
        let caches = Caches::new(1);
        let target = caches.join(Source::Told, 100);
        let hashes = prompt(1);
        caches.stored(target, Medium::Gpu, &hashes[..5]);
        caches.stored(target, Medium::Cpu, &hashes[..12]);
        caches.stored(target, Medium::Storage, &hashes[10..15]);
        let found = overlap(&caches, target, &hashes);
        assert_eq!((found.device, found.host, found.storage), (5, 7, 3));
        assert_eq!(caches.blocks(target, Medium::Cpu), 12);
        caches.cleared(target, Some(Medium::Cpu));
        let found = overlap(&caches, target, &hashes);
        assert_eq!((found.device, found.host, found.storage), (5, 0, 0));
    }

    #[test]
    fn what_was_just_sent_is_believed_for_a_while_and_never_counted_as_told() {
        let caches = Caches::new(1);
        let target = caches.join(Source::Told, 100);
        let hashes = prompt(1);
        caches.sent(target, &hashes, NOW);
        assert_eq!(overlap(&caches, target, &hashes).device, 20);
        assert_eq!(caches.told(target, &hashes), 0);
        assert_eq!(caches.blocks(target, Medium::Gpu), 0);
        caches.stored(target, Medium::Gpu, &hashes[..8]);
        caches.expire(NOW + SOON);
        assert_eq!(overlap(&caches, target, &hashes).device, 8);
        assert_eq!(caches.told(target, &hashes), 8);
    }

    #[test]
    fn a_target_that_begins_to_tell_or_leaves_is_known_for_nothing_else() {
        let caches = Caches::new(1);
        let (one, two) = (
            caches.join(Source::Learned, 100),
            caches.join(Source::Learned, 100),
        );
        let hashes = prompt(1);
        caches.sent(one, &hashes, NOW);
        caches.sent(two, &hashes, NOW);
        assert_eq!(caches.blocks(one, Medium::Gpu), 20);
        caches.turn(one, Source::Told);
        caches.leave(two);
        assert_eq!(overlap(&caches, one, &hashes), Overlap::default());
        assert_eq!(overlap(&caches, two, &hashes), Overlap::default());
        while caches.exact(Medium::Gpu).sweep() {}
        assert_eq!(caches.memory().held, 0);
    }
}
