//! `dynamo-kv-router`: its default indexer on one event thread, and the radix tree of one thread. The
//! positional one is left out: it takes only engines that name blocks by its own hash.

use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, OverlapScores, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, RadixTree};
use tokio::runtime::Runtime;

use crate::corpus::{BLOCK, Event, Prompt, What};

fn router_event(event: &Event) -> RouterEvent {
    let data = match &event.what {
        What::Store {
            parent,
            position,
            blocks,
        } => KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: parent.map(ExternalSequenceBlockHash),
            start_position: Some(*position),
            blocks: blocks
                .iter()
                .map(|block| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(block.engine),
                    tokens_hash: LocalBlockHash(block.content),
                    mm_extra_info: None,
                })
                .collect(),
        }),
        What::Remove { blocks } => KvCacheEventData::Removed(KvCacheRemoveData {
            block_hashes: blocks
                .iter()
                .map(|block| ExternalSequenceBlockHash(block.engine))
                .collect(),
        }),
    };
    let event_of = KvCacheEvent {
        event_id: 0,
        data,
        dp_rank: 0,
    };
    RouterEvent::new(event.worker as u64, event_of)
}

fn summed(scores: &OverlapScores) -> (usize, u32) {
    let deepest = scores.scores.values().copied().max();
    (scores.scores.len(), deepest.unwrap_or(0))
}

/// An indexer behind event threads.
pub struct Pooled<B: SyncIndexer> {
    pool: ThreadPoolIndexer<B>,
    runtime: Runtime,
}

pub type Compressed = Pooled<ConcurrentRadixTreeCompressed>;

trait Backend: SyncIndexer + Sized {
    fn backend() -> Self;
}

impl Backend for ConcurrentRadixTreeCompressed {
    fn backend() -> Self {
        Self::new()
    }
}

impl<B: Backend> crate::Index for Pooled<B> {
    type Event = RouterEvent;

    fn new(_: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("a runtime");
        let _inside = runtime.enter();
        Self {
            pool: ThreadPoolIndexer::new(B::backend(), 1, BLOCK as u32),
            runtime,
        }
    }

    fn event(&self, event: &Event) -> RouterEvent {
        router_event(event)
    }

    fn apply(&mut self, event: RouterEvent) {
        self.pool.enqueue_event(event).expect("its thread runs");
    }

    fn flush(&mut self) {
        let flushed = self.runtime.block_on(self.pool.flush_and_wait());
        flushed.expect("its thread runs");
    }

    fn look(&mut self, prompt: &Prompt) -> (usize, u32) {
        summed(&self.pool.backend().find_matches(&prompt.dynamo, false))
    }
}

/// The tree of one thread.
pub struct Radix(RadixTree);

impl crate::Index for Radix {
    type Event = RouterEvent;

    fn new(_: usize) -> Self {
        Self(RadixTree::new())
    }

    fn event(&self, event: &Event) -> RouterEvent {
        router_event(event)
    }

    fn apply(&mut self, event: RouterEvent) {
        self.0.apply_event(event).expect("the parent is there");
    }

    fn look(&mut self, prompt: &Prompt) -> (usize, u32) {
        summed(&self.0.find_matches(prompt.dynamo.clone(), false))
    }
}
