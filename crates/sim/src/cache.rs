//! The paged prefix cache: which block holds what, who uses it, and which one is given away next.
//!
//! The rules are vLLM's (v1/core/block_pool.py, 0.32): block 0 is a placeholder that is never
//! handed out, a full block is found again by the hash of everything up to its end, a block that
//! nobody uses stays findable until it is needed, and blocks without a hash are reused before
//! those with one. Two blocks may bear the same hash: a request never swaps a block that it
//! has already filled.

use std::collections::HashMap;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Index of a block in the pool.
pub type BlockId = u32;

/// Hash of a full block and of everything before it; equal hashes mean equal prefixes.
pub type BlockHash = u64;

const NIL: BlockId = BlockId::MAX;

/// What happened to the cache, as KV events tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Consecutive blocks of one request became findable.
    Stored {
        hashes: Vec<BlockHash>,
        parent: Option<BlockHash>,
        /// The blocks' tokens, one block after the other.
        tokens: Vec<u32>,
        lora: Option<(u64, String)>,
        /// Per block: the cache salt (first block of a salted prompt) or the adapter's name.
        extra_keys: Vec<Option<Vec<String>>>,
    },
    /// Blocks were taken away to be reused.
    Removed { hashes: Vec<BlockHash> },
    /// Everything was forgotten.
    Cleared,
}

/// Hashes one full block.
///
/// `extra` is what keeps equal tokens apart: a salt or an adapter; empty for most blocks.
#[must_use]
pub fn block_hash(parent: Option<BlockHash>, tokens: &[u32], extra: &[String]) -> BlockHash {
    let mut hasher = Xxh3::new();
    hasher.update(
        &parent
            .unwrap_or_else(|| xxh3_64(b"stator-sim-no-parent"))
            .to_le_bytes(),
    );
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    for key in extra {
        hasher.update(&[0xff]);
        hasher.update(key.as_bytes());
    }
    hasher.digest()
}

#[derive(Clone, Debug)]
struct Block {
    users: u32,
    hash: Option<BlockHash>,
    prev: BlockId,
    next: BlockId,
    queued: bool,
}

/// All KV blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Ends of the list of unused blocks; the head is given away next.
    head: BlockId,
    tail: BlockId,
    free: usize,
    by_hash: HashMap<BlockHash, Vec<BlockId>>,
    caching: bool,
    record: bool,
    events: Vec<CacheEvent>,
}

impl BlockPool {
    /// Makes a pool of `count` blocks, the placeholder included.
    ///
    /// `caching`: whether blocks are found again. `record`: whether events are kept for
    /// [`BlockPool::take_events`].
    #[must_use]
    pub fn new(count: usize, caching: bool, record: bool) -> Self {
        let mut pool = Self {
            blocks: vec![
                Block {
                    users: 0,
                    hash: None,
                    prev: NIL,
                    next: NIL,
                    queued: false,
                };
                count.max(1)
            ],
            head: NIL,
            tail: NIL,
            free: 0,
            by_hash: HashMap::new(),
            caching,
            record,
            events: Vec::new(),
        };
        for id in 1..pool.blocks.len() {
            pool.push_back(id as BlockId);
        }
        pool
    }

    /// Blocks that nobody uses, findable ones included.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.free
    }

    /// Blocks that can be handed out at all.
    #[must_use]
    pub fn usable_blocks(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Share of the blocks in use, 0 to 1.
    #[must_use]
    pub fn usage(&self) -> f64 {
        match self.usable_blocks() {
            0 => 0.0,
            usable => 1.0 - self.free as f64 / usable as f64,
        }
    }

    /// Finds a block by its hash, without taking it.
    #[must_use]
    pub fn lookup(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).and_then(|ids| ids.first().copied())
    }

    /// How many of `ids` nobody uses now, so that taking them lowers the number of free blocks.
    #[must_use]
    pub fn unused_among(&self, ids: &[BlockId]) -> usize {
        ids.iter()
            .filter(|&&id| self.blocks[id as usize].users == 0)
            .count()
    }

    /// Adds a user to blocks that were found.
    pub fn take(&mut self, ids: &[BlockId]) {
        for &id in ids {
            if self.blocks[id as usize].users == 0 {
                self.unlink(id);
            }
            self.blocks[id as usize].users += 1;
        }
    }

    /// Hands out `count` blocks with one user each, or none at all.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.free {
            return None;
        }
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            let id = self.head;
            self.unlink(id);
            self.forget(id);
            self.blocks[id as usize].users = 1;
            ids.push(id);
        }
        Some(ids)
    }

    /// Takes one user away from each block. The last block of a request goes first, so that a
    /// prefix outlives what follows it.
    ///
    /// # Panics
    /// If a block has no user: a count would become negative.
    pub fn release(&mut self, ids: &[BlockId]) {
        for &id in ids.iter().rev() {
            let block = &mut self.blocks[id as usize];
            assert!(block.users > 0, "block {id} was released too often");
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.hash.is_some() {
                self.push_back(id);
            } else {
                self.push_front(id);
            }
        }
    }

    /// Makes full blocks findable.
    ///
    /// - `ids`, `hashes`, `extra_keys`: one per block, in order;
    /// - `parent`: hash of the block before the first of them;
    /// - `tokens`: the blocks' tokens.
    pub fn store(
        &mut self,
        ids: &[BlockId],
        hashes: &[BlockHash],
        parent: Option<BlockHash>,
        tokens: &[u32],
        lora: Option<&(u64, String)>,
        extra_keys: Vec<Option<Vec<String>>>,
    ) {
        if !self.caching || ids.is_empty() {
            return;
        }
        for (&id, &hash) in ids.iter().zip(hashes) {
            self.blocks[id as usize].hash = Some(hash);
            self.by_hash.entry(hash).or_default().push(id);
        }
        if self.record {
            self.events.push(CacheEvent::Stored {
                hashes: hashes.to_vec(),
                parent,
                tokens: tokens.to_vec(),
                lora: lora.cloned(),
                extra_keys,
            });
        }
    }

    /// Forgets every block. False, and nothing done, while any block is in use.
    pub fn reset(&mut self) -> bool {
        if self.free != self.usable_blocks() {
            return false;
        }
        self.by_hash.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        if self.record {
            self.events.push(CacheEvent::Cleared);
        }
        true
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.events)
    }

    fn forget(&mut self, id: BlockId) {
        let Some(hash) = self.blocks[id as usize].hash.take() else {
            return;
        };
        if let Some(ids) = self.by_hash.get_mut(&hash) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.by_hash.remove(&hash);
            }
        }
        if self.record {
            self.events.push(CacheEvent::Removed { hashes: vec![hash] });
        }
    }

    fn push_back(&mut self, id: BlockId) {
        let tail = self.tail;
        let block = &mut self.blocks[id as usize];
        (block.prev, block.next, block.queued) = (tail, NIL, true);
        if tail == NIL {
            self.head = id;
        } else {
            self.blocks[tail as usize].next = id;
        }
        self.tail = id;
        self.free += 1;
    }

    fn push_front(&mut self, id: BlockId) {
        let head = self.head;
        let block = &mut self.blocks[id as usize];
        (block.prev, block.next, block.queued) = (NIL, head, true);
        if head == NIL {
            self.tail = id;
        } else {
            self.blocks[head as usize].prev = id;
        }
        self.head = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        assert!(block.queued, "block {id} is not in the free list");
        let (prev, next) = (block.prev, block.next);
        block.queued = false;
        if prev == NIL {
            self.head = next;
        } else {
            self.blocks[prev as usize].next = next;
        }
        if next == NIL {
            self.tail = prev;
        } else {
            self.blocks[next as usize].prev = prev;
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(pool: &mut BlockPool, hashes: &[BlockHash]) -> Vec<BlockId> {
        let ids = pool.allocate(hashes.len()).unwrap();
        pool.store(&ids, hashes, None, &[], None, vec![None; hashes.len()]);
        ids
    }

    #[test]
    fn a_released_block_is_found_until_it_is_reused() {
        let mut pool = BlockPool::new(4, true, true);
        let ids = stored(&mut pool, &[7, 8]);
        pool.release(&ids);
        assert_eq!(pool.lookup(7), Some(ids[0]));
        assert_eq!(pool.free_blocks(), 3);
        let all = pool.allocate(3).unwrap();
        assert_eq!(pool.lookup(7), None);
        assert!(pool.allocate(1).is_none());
        pool.release(&all);
        let removed: Vec<_> = pool
            .take_events()
            .into_iter()
            .filter_map(|event| match event {
                CacheEvent::Removed { hashes } => Some(hashes),
                _ => None,
            })
            .collect();
        // The tail of a prompt goes before its head.
        assert_eq!(removed, vec![vec![8], vec![7]]);
    }

    #[test]
    fn blocks_without_a_hash_are_reused_first() {
        let mut pool = BlockPool::new(4, true, false);
        let cached = stored(&mut pool, &[7]);
        let plain = pool.allocate(1).unwrap();
        pool.release(&cached);
        pool.release(&plain);
        assert_eq!(pool.allocate(1).unwrap(), plain);
    }

    #[test]
    fn a_pool_in_use_is_not_reset() {
        let mut pool = BlockPool::new(3, true, true);
        let ids = stored(&mut pool, &[7]);
        assert!(!pool.reset());
        pool.release(&ids);
        assert!(pool.reset());
        assert_eq!(pool.lookup(7), None);
        assert_eq!(pool.take_events().last(), Some(&CacheEvent::Cleared));
    }

    #[test]
    fn a_hash_covers_what_comes_before_and_what_keeps_it_apart() {
        let first = block_hash(None, &[1, 2], &[]);
        assert_ne!(
            block_hash(Some(first), &[3, 4], &[]),
            block_hash(None, &[3, 4], &[])
        );
        assert_ne!(first, block_hash(None, &[1, 2], &["tenant".into()]));
        assert_eq!(first, block_hash(None, &[1, 2], &[]));
    }
}
