//! What this processor knows of one model's KV caches: who holds how much of a prompt, and whether that proves true.
//!
//! [`Knowledge`] is shared by the pools of all roles, so that a prompt is hashed once and means the same to each. A
//! target's part of it is an [`Entry`]. Where a worker's relay tells what its engines hold, `follow` keeps that up to
//! date; elsewhere it is learned from what is sent.

mod follow;

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use stator_common::events::{Medium, ViewId};
use stator_common::proto::worker::GenerateRequest;
use stator_router::{BlockHash, Cached, Caches, Drift, Overlap, Overlaps, Source, hash, index};
use tokio::time::Instant;
use tracing::warn;

pub(crate) use follow::Following;

/// Asks for all of a view again.
pub(crate) type Resync = Arc<dyn Fn(&ViewId) + Send + Sync>;

/// What is counted of a model's expectations.
#[derive(Clone, Debug)]
pub(crate) struct KnowledgeMetrics {
    /// Tokens that workers had said they hold, of the prompts that were sent there.
    pub(crate) expected: Counter,
    /// Of these, tokens that their engines did not find.
    pub(crate) missing: Counter,
    /// Views that were asked for again because of that.
    pub(crate) resyncs: Counter,
}

/// What is known of one model's KV caches.
pub(crate) struct Knowledge {
    caches: Caches,
    block_size: usize,
    since: Instant,
    resync: Resync,
    metrics: KnowledgeMetrics,
}

impl Knowledge {
    /// Returns knowledge of nothing.
    ///
    /// - `block_size`: tokens per block, of all workers of the model.
    pub(crate) fn new(block_size: u32, resync: Resync, metrics: KnowledgeMetrics) -> Self {
        Self {
            caches: Caches::new(rand::random()),
            block_size: (block_size as usize).max(1),
            since: Instant::now(),
            resync,
            metrics,
        }
    }

    /// Returns the names of a prompt's full blocks.
    pub(crate) fn hash(&self, request: &GenerateRequest, tokens: &[u32]) -> Arc<[BlockHash]> {
        let root = hash::root(&request.lora, &request.cache_salt);
        hash::blocks(root, tokens, self.block_size).into()
    }

    /// Returns the moment, as everything here counts it.
    pub(crate) fn now(&self) -> Duration {
        self.since.elapsed()
    }

    /// Finds who holds how much of a prompt.
    ///
    /// - `blocks`: of the prompt, whose `tokens` there are.
    pub(crate) fn overlaps(&self, blocks: &[BlockHash], tokens: usize, out: &mut Overlaps) {
        self.caches.overlaps(self.useful(blocks, tokens), out);
    }

    /// Forgets what was sent too long ago. To be called about once a second.
    pub(crate) fn expire(&self) {
        self.caches.expire(self.now());
    }

    /// Leaves out the block of the last token, which an engine computes in any case.
    fn useful<'a>(&self, blocks: &'a [BlockHash], tokens: usize) -> &'a [BlockHash] {
        &blocks[..blocks.len().min(tokens.saturating_sub(1) / self.block_size)]
    }
}

/// What is known of one target's cache. Forgotten when dropped.
pub(crate) struct Entry {
    knowledge: Arc<Knowledge>,
    at: index::Target,
    view: ViewId,
    drift: Mutex<Drift>,
}

impl Entry {
    /// - `blocks`: of its cache; 0: not known.
    pub(crate) fn new(knowledge: &Arc<Knowledge>, view: ViewId, blocks: u64) -> Self {
        let blocks = if blocks == 0 { u64::MAX } else { blocks };
        Self {
            knowledge: Arc::clone(knowledge),
            // Until it tells.
            at: knowledge.caches.join(Source::Learned, blocks),
            view,
            drift: Mutex::default(),
        }
    }

    /// Returns what of a prompt it holds, in tokens.
    pub(crate) fn cached(&self, overlaps: &Overlaps) -> Cached {
        let Overlap {
            device,
            host,
            storage,
        } = overlaps.of(self.at);
        let tokens = |blocks: u32| u64::from(blocks) * self.knowledge.block_size as u64;
        Cached {
            device: tokens(device),
            host: tokens(host),
            storage: tokens(storage),
        }
    }

    /// Notes that a prompt is sent to it.
    pub(crate) fn sent(&self, blocks: &[BlockHash]) {
        let knowledge = &self.knowledge;
        knowledge.caches.sent(self.at, blocks, knowledge.now());
    }

    /// Returns how many tokens of a prompt it has said that it holds.
    pub(crate) fn told(&self, blocks: &[BlockHash], tokens: usize) -> u64 {
        let knowledge = &self.knowledge;
        let blocks = knowledge.useful(blocks, tokens);
        u64::from(knowledge.caches.told(self.at, blocks)) * knowledge.block_size as u64
    }

    /// Compares what was expected of an answer with what its engine found.
    ///
    /// - `expected`: by [`Entry::told`], when the request was sent.
    pub(crate) fn compare(&self, expected: u64, found: u64) {
        if expected == 0 {
            return;
        }
        let Knowledge {
            metrics, resync, ..
        } = &*self.knowledge;
        metrics.expected.increment(expected);
        metrics.missing.increment(expected.saturating_sub(found));
        let wrong = self.drift.lock().compare(expected, found);
        if wrong {
            metrics.resyncs.increment(1);
            warn!(view = %self.view, "its engine lacks much of what it was said to hold: asking for all of it again");
            resync(&self.view);
        }
    }

    /// Returns the share of what was expected lately that was missing.
    pub(crate) fn drift(&self) -> f64 {
        self.drift.lock().share()
    }

    /// Returns how many blocks it holds in a medium, as far as is known.
    pub(crate) fn blocks(&self, medium: Medium) -> u64 {
        self.knowledge.caches.blocks(self.at, medium)
    }

    /// Says whether it tells itself what it holds.
    pub(crate) fn tells(&self) -> bool {
        self.knowledge.caches.source(self.at) == Some(Source::Told)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.knowledge.caches.leave(self.at);
    }
}
