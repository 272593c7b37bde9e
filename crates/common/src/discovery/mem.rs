//! Discovery inside one process, for tests and for roles that share a process.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use super::{
    Discovery, DiscoveryError, Event, Peer, Registration, WATCH_BUFFER, Watch, difference,
};
use crate::{Card, ids::WorkerId};

/// A place that exists as long as somebody holds it. Clones are the same place.
#[derive(Clone, Default)]
pub struct Mem {
    place: Arc<Place>,
}

#[derive(Default)]
struct Place {
    cards: Mutex<Cards>,
    changed: Notify,
    peers: Mutex<BTreeMap<String, Peer>>,
}

#[derive(Default)]
struct Cards {
    /// Each with a number that tells registrations of the same worker apart.
    by_worker: BTreeMap<WorkerId, (u64, Card)>,
    last: u64,
}

struct Leave {
    place: Weak<Place>,
    worker: WorkerId,
    number: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        let Some(place) = self.place.upgrade() else {
            return;
        };
        let mut cards = place.cards.lock();
        // A newer registration of the same worker stays.
        if cards
            .by_worker
            .get(&self.worker)
            .is_some_and(|(number, _)| *number == self.number)
        {
            cards.by_worker.remove(&self.worker);
            place.changed.notify_waiters();
        }
    }
}

#[async_trait]
impl Discovery for Mem {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        let mut cards = self.place.cards.lock();
        cards.last += 1;
        let number = cards.last;
        let worker = card.worker.clone();
        cards.by_worker.insert(worker.clone(), (number, card));
        self.place.changed.notify_waiters();
        Ok(Registration::new(Leave {
            place: Arc::downgrade(&self.place),
            worker,
            number,
        }))
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        let (sender, events) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(follow(self.place.clone(), sender));
        Ok(Watch { events })
    }

    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError> {
        let name = peer.name.clone();
        self.place.peers.lock().insert(name.clone(), peer);
        Ok(Registration::new(Part {
            place: Arc::downgrade(&self.place),
            name,
        }))
    }

    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError> {
        Ok(self.place.peers.lock().values().cloned().collect())
    }

    fn name(&self) -> String {
        "this process's memory".to_owned()
    }
}

/// The end of a processor's stay.
struct Part {
    place: Weak<Place>,
    name: String,
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(place) = self.place.upgrade() {
            place.peers.lock().remove(&self.name);
        }
    }
}

async fn follow(place: Arc<Place>, sender: mpsc::Sender<Event>) {
    let mut known = BTreeMap::new();
    loop {
        let changed = place.changed.notified();
        tokio::pin!(changed);
        // Enrolled before looking, so that no change falls in between.
        changed.as_mut().enable();
        let now: BTreeMap<WorkerId, Card> = place
            .cards
            .lock()
            .by_worker
            .iter()
            .map(|(worker, (_, card))| (worker.clone(), card.clone()))
            .collect();
        for event in difference(&known, &now) {
            if sender.send(event).await.is_err() {
                return;
            }
        }
        known = now;
        tokio::select! {
            () = changed => {}
            () = sender.closed() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::tests::{card, peer};

    #[tokio::test]
    async fn a_watcher_learns_of_workers_that_were_there_come_and_leave() {
        let mem = Mem::default();
        let first = mem.register(card("a")).await.unwrap();
        let mut watch = mem.watch().await.unwrap();
        assert_eq!(watch.next().await, Some(Event::Put(Box::new(card("a")))));
        let _second = mem.register(card("b")).await.unwrap();
        assert_eq!(watch.next().await, Some(Event::Put(Box::new(card("b")))));
        drop(first);
        assert_eq!(watch.next().await, Some(Event::Gone(WorkerId("a".into()))));
    }

    #[tokio::test]
    async fn processors_are_there_until_they_leave() {
        let mem = Mem::default();
        let one = mem.join(peer("a")).await.unwrap();
        let _two = mem.join(peer("b")).await.unwrap();
        assert_eq!(mem.peers().await.unwrap(), [peer("a"), peer("b")]);
        drop(one);
        assert_eq!(mem.peers().await.unwrap(), [peer("b")]);
    }

    #[tokio::test]
    async fn leaving_late_does_not_take_a_newer_registration_away() {
        let mem = Mem::default();
        let old = mem.register(card("a")).await.unwrap();
        let _new = mem.register(card("a")).await.unwrap();
        drop(old);
        let mut watch = mem.watch().await.unwrap();
        assert_eq!(watch.next().await, Some(Event::Put(Box::new(card("a")))));
    }
}
