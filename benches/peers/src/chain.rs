//! `kv-index`: the chain index, one shard, a block map per worker, as its gateway uses it.

use kv_index::{ChainBlockMap, ContentHash, SequenceHash, ShardedChainIndex, StoredBlock};

use crate::corpus::{Event, Prompt, What};

pub struct Chain {
    index: ShardedChainIndex,
    workers: Vec<(u32, ChainBlockMap)>,
}

pub enum Prepared {
    Store(usize, Option<SequenceHash>, Vec<StoredBlock>),
    Remove(usize, Vec<SequenceHash>),
}

impl crate::Index for Chain {
    type Event = Prepared;

    fn new(workers: usize) -> Self {
        let index = ShardedChainIndex::with_shards(1);
        let workers = (0..workers).map(|worker| {
            let id = index.intern_worker(&format!("http://worker-{worker}"));
            (id.expect("there is room"), ChainBlockMap::new())
        });
        let workers = workers.collect();
        Self { index, workers }
    }

    fn event(&self, event: &Event) -> Prepared {
        match &event.what {
            What::Store { parent, blocks, .. } => {
                let blocks = blocks.iter().map(|block| StoredBlock {
                    seq_hash: SequenceHash(block.engine),
                    content_hash: ContentHash(block.content),
                });
                Prepared::Store(event.worker, parent.map(SequenceHash), blocks.collect())
            }
            What::Remove { blocks } => {
                let hashes = blocks.iter().map(|block| SequenceHash(block.engine));
                Prepared::Remove(event.worker, hashes.collect())
            }
        }
    }

    fn apply(&mut self, event: Prepared) {
        match event {
            Prepared::Store(worker, parent, blocks) => {
                let (id, map) = &mut self.workers[worker];
                let stored = self.index.apply_stored(*id, &blocks, parent, map);
                stored.expect("the parent is there");
            }
            Prepared::Remove(worker, hashes) => {
                let (id, map) = &mut self.workers[worker];
                self.index.apply_removed(*id, &hashes, map);
            }
        }
    }

    fn look(&mut self, prompt: &Prompt) -> (usize, u32) {
        let found = self.index.find_matches(&prompt.chain, false);
        let deepest = found.scores.values().copied().max();
        (found.scores.len(), deepest.unwrap_or(0))
    }
}
