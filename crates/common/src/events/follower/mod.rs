//! The subscriber's side of KV events: exact views of what relays tell, told on as they change.
//!
//! [`Follower::follow`] takes a worker's card, and [`Events::next`] yields what becomes of the views of its ranks: first
//! an [`Update::Reset`] with all that is there, then each change. A loss on the way, a relay or an engine that starts
//! again, all are repaired here and end in another `Reset`. One task per worker keeps one connection to its relay.

mod link;
mod track;

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::view::{Blocks, Change, ViewId};
use crate::{WorkerId, card::Relay, nats::Nats};

pub use link::Patience;
pub use track::{Next, Track};

/// Events that may wait for whoever takes them. Beyond, relays are not listened to, and what they published
/// meanwhile is made up for by a snapshot.
const EVENTS_BUFFER: usize = 1024;

/// What became of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub view: ViewId,
    pub update: Update,
}

/// What became of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// This is all that is there; what was known before does not count.
    Reset {
        /// Which life of the view this is; for logs.
        epoch: u64,
        /// One entry per medium that has blocks.
        blocks: Vec<Blocks>,
    },
    /// What is known changed.
    Changed(Change),
    /// Nothing is known any more: the worker left, or its relay is silent. A `Reset` follows if it comes back.
    Lost,
}

/// Follows workers. Clones follow together; the last one dropped ends it.
#[derive(Clone)]
pub struct Follower(Arc<Shared>);

struct Shared {
    patience: Patience,
    nats: Nats,
    events: mpsc::Sender<Event>,
    followed: Mutex<HashMap<WorkerId, Followed>>,
}

struct Followed {
    relay: Relay,
    ranks: u32,
    stop: CancellationToken,
    resync: mpsc::Sender<u32>,
    task: JoinHandle<()>,
}

/// What becomes of all followed views, in order per view.
pub struct Events(mpsc::Receiver<Event>);

impl Events {
    /// Waits for the next event; `None` once the follower is gone. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }
}

impl Follower {
    /// Starts following nobody.
    ///
    /// - `nats`: for relays that are reached by it.
    pub fn new(patience: Patience, nats: Nats) -> (Self, Events) {
        let (events, receiver) = mpsc::channel(EVENTS_BUFFER);
        let shared = Shared {
            patience,
            nats,
            events,
            followed: Mutex::default(),
        };
        (Self(Arc::new(shared)), Events(receiver))
    }

    /// Follows a worker from here on; again with the same card, nothing changes. Must be called within a tokio
    /// runtime.
    ///
    /// - `ranks`: data-parallel ranks of the worker, each a view.
    /// - `relay`: `card.kv_events.relay`.
    pub fn follow(&self, worker: &WorkerId, ranks: u32, relay: &Relay) {
        let mut followed = self.0.followed.lock();
        if let Some(known) = followed.get(worker)
            && known.relay == *relay
            && known.ranks == ranks
        {
            return;
        }
        let before = followed.remove(worker).map(Followed::stop);
        let stop = CancellationToken::new();
        // One that does not fit is one of many of the same.
        let (resync, resyncs) = mpsc::channel(16);
        let link = link::Link {
            worker: worker.clone(),
            ranks,
            nats: self.0.nats.clone(),
            relay: relay.clone(),
            patience: self.0.patience,
            events: self.0.events.clone(),
            resyncs,
        };
        let task = tokio::spawn({
            let stop = stop.clone();
            async move {
                // What was told of its views comes to an end first.
                if let Some(before) = before {
                    let _ = before.await;
                }
                link.run(stop).await;
            }
        });
        followed.insert(
            worker.clone(),
            Followed {
                relay: relay.clone(),
                ranks,
                stop,
                resync,
                task,
            },
        );
    }

    /// Stops following a worker: each view of it that something is known of ends with [`Update::Lost`].
    pub fn forget(&self, worker: &WorkerId) {
        if let Some(followed) = self.0.followed.lock().remove(worker) {
            followed.stop();
        }
    }

    /// Asks for all of a view again, because what is known of it seems wrong. Ends in a [`Update::Reset`].
    pub fn resync(&self, view: &ViewId) {
        if let Some(followed) = self.0.followed.lock().get(&view.worker) {
            let _ = followed.resync.try_send(view.dp_rank);
        }
    }
}

impl Followed {
    fn stop(self) -> JoinHandle<()> {
        self.stop.cancel();
        self.task
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for (_, followed) in self.followed.get_mut().drain() {
            followed.stop();
        }
    }
}

#[cfg(test)]
mod tests;
