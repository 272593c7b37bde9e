//! Keeps what workers say of their caches up to date.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use stator_common::WorkerId;
use stator_common::card::Card;
use stator_common::events::follower::{Patience, Update};
use stator_common::events::{Blocks, Change, Event, Events, Follower, ViewId};
use stator_common::nats::Nats;
use stator_router::{BlockHash, Source};
use tracing::{info, warn};

use super::{Entry, Knowledge, Resync};
use crate::metrics::ModelMetrics;
use crate::pool::{RouterMode, Target};

/// Blocks that are taken in between two chances for other tasks: some hundred microseconds of work.
const AT_ONCE: usize = 16_384;

/// Follows the workers that tell what their caches hold.
pub(crate) struct Following {
    mode: RouterMode,
    /// Present with kv.
    follower: Option<Follower>,
    views: Views,
}

/// The targets whose views are followed.
type Views = Arc<Mutex<HashMap<ViewId, Arc<Target>>>>;

impl Following {
    /// Begins to follow nobody, within a tokio runtime.
    ///
    /// - `nats`: the link to relays that are reached by it.
    pub(crate) fn new(mode: RouterMode, nats: Nats) -> Self {
        let views = Views::default();
        let follower = (mode == RouterMode::Kv).then(|| {
            let (follower, events) = Follower::new(Patience::default(), nats);
            // Ends with the follower.
            tokio::spawn(take_in(events, Arc::clone(&views)));
            follower
        });
        Self {
            mode,
            follower,
            views,
        }
    }

    /// Returns what is to be known of a model's caches, if anybody looks at that.
    pub(crate) fn knowledge(&self, card: &Card, metrics: &ModelMetrics) -> Option<Arc<Knowledge>> {
        if !self.mode.looks_at_caches() {
            return None;
        }
        let follower = self.follower.clone();
        let resync: Resync = Arc::new(move |view| {
            if let Some(follower) = &follower {
                follower.resync(view);
            }
        });
        let metrics = metrics.knowledge.clone();
        let knowledge = Knowledge::new(card.model.block_size, resync, metrics);
        Some(Arc::new(knowledge))
    }

    /// Follows a worker, if that can be.
    ///
    /// - `targets`: all of them.
    pub(crate) fn add(&self, targets: &[Arc<Target>], card: &Card) {
        let Some(follower) = &self.follower else {
            return;
        };
        let relay = card.kv_events.as_ref();
        let Some(relay) = relay.and_then(|events| events.relay.as_ref()) else {
            warn!(
                worker = %card.worker,
                "nobody tells what its cache holds: that is guessed from what it is sent, as with --router-mode approx"
            );
            return;
        };
        let mut views = self.views.lock();
        for target in targets {
            views.insert(target.view(), Arc::clone(target));
        }
        drop(views);
        follower.follow(&card.worker, card.model.dp_size.max(1), relay);
    }

    /// Forgets a worker.
    pub(crate) fn remove(&self, worker: &WorkerId) {
        if let Some(follower) = &self.follower {
            follower.forget(worker);
            let mut views = self.views.lock();
            views.retain(|view, _| view.worker != *worker);
        }
    }
}

/// Takes in what is said, until nobody follows any more.
async fn take_in(mut events: Events, views: Views) {
    while let Some(Event { view, update }) = events.next().await {
        let target = views.lock().get(&view).cloned();
        // What is still said of a worker that left concerns nobody.
        if let Some(entry) = target.as_ref().and_then(|target| target.entry()) {
            entry.take_in(update).await;
        }
    }
}

impl Entry {
    async fn take_in(&self, update: Update) {
        let caches = &self.knowledge.caches;
        match update {
            Update::Reset { epoch, blocks } => {
                let count: usize = blocks.iter().map(|blocks| blocks.hashes.len()).sum();
                info!(view = %self.view, epoch, blocks = count, "its cache is known");
                caches.turn(self.at, Source::Told);
                caches.cleared(self.at, None);
                for blocks in blocks {
                    self.stored(&blocks).await;
                }
            }
            Update::Changed(Change::Stored(blocks)) => self.stored(&blocks).await,
            Update::Changed(Change::Removed(Blocks { medium, hashes })) => {
                let hashes: Vec<_> = hashes.into_iter().map(BlockHash).collect();
                caches.removed(self.at, medium, &hashes);
            }
            Update::Changed(Change::Cleared(medium)) => caches.cleared(self.at, medium),
            Update::Lost => {
                info!(view = %self.view, "its cache is no longer known: it is guessed from what is sent there");
                caches.turn(self.at, Source::Learned);
            }
        }
    }

    async fn stored(&self, blocks: &Blocks) {
        let caches = &self.knowledge.caches;
        for (nth, hashes) in blocks.hashes.chunks(AT_ONCE).enumerate() {
            if nth > 0 {
                tokio::task::yield_now().await;
            }
            let hashes: Vec<_> = hashes.iter().copied().map(BlockHash).collect();
            caches.stored(self.at, blocks.medium, &hashes);
        }
    }
}
