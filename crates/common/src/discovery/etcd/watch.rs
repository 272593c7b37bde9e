//! Follows the workers' keys, across interruptions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tonic::Status;
use tracing::{info, warn};

use super::{ANSWER_WITHIN, Place, TTL, client::Client, why};
use crate::{
    Card,
    discovery::{Event, again::Again},
    ids::WorkerId,
    proto::etcd::{KeyValue, event::EventType},
};

/// Nobody listens any more.
struct Unheard;

/// Why following ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{}", why(.0))]
    Etcd(#[from] Status),
    #[error("no answer for {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    #[error("etcd ended the watch: {0}")]
    Ended(String),
}

/// Sends what happens to workers until nobody listens.
pub(super) async fn follow(place: Arc<Place>, sender: mpsc::Sender<Event>) {
    let mut view = View {
        known: BTreeMap::new(),
        missing: BTreeSet::new(),
        missing_until: Instant::now(),
        sender: sender.clone(),
    };
    let mut again = Again::new();
    let mut is_told = false;
    loop {
        let broken = tokio::select! {
            end = follow_once(&place, &mut view, &mut again) => match end {
                Ok(Unheard) => return,
                Err(broken) => broken,
            },
            () = sender.closed() => return,
        };
        if !is_told {
            warn!(reason = %broken, "etcd is away: going on with the workers that are known");
        }
        // Once per interruption: `again` begins anew when following has begun anew.
        is_told = again.has_paused();
        tokio::select! {
            () = again.pause() => {}
            () = sender.closed() => return,
        }
    }
}

async fn follow_once(place: &Place, view: &mut View, again: &mut Again) -> Result<Unheard, Broken> {
    let asked = timeout(ANSWER_WITHIN * 2, async {
        let client = Client::connect(&place.access).await?;
        let (pairs, revision) = client.below(&place.prefix).await?;
        let changes = client.watch(&place.prefix, revision + 1).await?;
        Ok::<_, Status>((pairs, changes))
    });
    let (pairs, mut changes) = asked.await.map_err(|_| Broken::Silent)??;
    let cards = pairs.iter().filter_map(card);
    let workers = cards.map(|card| (card.worker.clone(), card)).collect();
    if view.replace(workers).await.is_err() {
        return Ok(Unheard);
    }
    if again.has_paused() {
        info!("etcd is back");
    }
    *again = Again::new();
    loop {
        let message = tokio::select! {
            message = changes.message() => message?,
            () = sleep_until(view.missing_until), if !view.missing.is_empty() => {
                if view.give_up_missing().await.is_err() {
                    return Ok(Unheard);
                }
                continue;
            }
        };
        let Some(message) = message else {
            return Err(Broken::Ended("closed".to_owned()));
        };
        // A watch that starts before what etcd still has is cancelled, with the revision it was compacted to.
        if message.canceled || message.compact_revision != 0 {
            return Err(Broken::Ended(message.cancel_reason));
        }
        for event in message.events {
            let kind = event.r#type();
            let Some(pair) = event.kv else { continue };
            let heard = match kind {
                EventType::Put => match card(&pair) {
                    Some(card) => view.put(card).await,
                    None => Ok(()),
                },
                EventType::Delete => view.gone(&worker(&pair)).await,
            };
            if heard.is_err() {
                return Ok(Unheard);
            }
        }
    }
}

/// Reads a card; nothing for a value that is none, which is said.
fn card(pair: &KeyValue) -> Option<Card> {
    serde_json::from_slice::<Card>(&pair.value)
        .inspect_err(|error| {
            let key = String::from_utf8_lossy(&pair.key);
            warn!(%key, %error, "not a worker's card");
        })
        .ok()
}

/// Returns whose key it is.
fn worker(pair: &KeyValue) -> WorkerId {
    let key = String::from_utf8_lossy(&pair.key);
    WorkerId(key.rsplit('/').next().unwrap_or_default().to_owned())
}

/// The workers that the listener knows of.
struct View {
    known: BTreeMap<WorkerId, Card>,
    /// Those that were not there after an interruption, which may only not be back yet.
    missing: BTreeSet<WorkerId>,
    missing_until: Instant,
    sender: mpsc::Sender<Event>,
}

impl View {
    /// Goes over to what is there now.
    async fn replace(&mut self, now: BTreeMap<WorkerId, Card>) -> Result<(), Unheard> {
        let absent = self.known.keys().filter(|worker| !now.contains_key(worker));
        self.missing = absent.cloned().collect();
        self.missing_until = Instant::now() + TTL;
        for card in now.into_values() {
            self.put(card).await?;
        }
        Ok(())
    }

    async fn put(&mut self, card: Card) -> Result<(), Unheard> {
        self.missing.remove(&card.worker);
        if self.known.get(&card.worker) == Some(&card) {
            return Ok(());
        }
        self.known.insert(card.worker.clone(), card.clone());
        self.send(Event::Put(Box::new(card))).await
    }

    async fn gone(&mut self, worker: &WorkerId) -> Result<(), Unheard> {
        self.missing.remove(worker);
        match self.known.remove(worker) {
            Some(_) => self.send(Event::Gone(worker.clone())).await,
            None => Ok(()),
        }
    }

    async fn give_up_missing(&mut self) -> Result<(), Unheard> {
        for worker in std::mem::take(&mut self.missing) {
            self.gone(&worker).await?;
        }
        Ok(())
    }

    async fn send(&self, event: Event) -> Result<(), Unheard> {
        self.sender.send(event).await.map_err(|_| Unheard)
    }
}
