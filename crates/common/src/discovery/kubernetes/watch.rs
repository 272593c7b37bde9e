//! Follows the workers, or the processors, on all pods, across interruptions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::StreamExt;
use kube::{
    Api,
    runtime::watcher::{self, Event as Change},
};
use tokio::sync::{mpsc, watch};

use super::{
    Place,
    access::{self, Changes, Interruption, why_watch},
    pod::{self, Pod, Record, Records},
};
use crate::{
    Card,
    discovery::{Event, Peer, difference},
};

/// Sends what happens to workers until nobody listens.
pub(super) async fn workers(place: Arc<Place>, sender: mpsc::Sender<Event>) {
    let known = "going on with the workers that are known";
    let mut follower = Follower::<Card>::new(place.pods.clone(), known);
    loop {
        let changed = tokio::select! {
            changed = follower.next() => changed,
            () = sender.closed() => return,
        };
        for (before, now) in changed {
            for event in difference(&before, &now) {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Tells which processors there are, once that is known, for ever.
pub(super) async fn processors(pods: Api<Pod>, known: watch::Sender<Option<Vec<Peer>>>) {
    let mut follower = Follower::new(pods, "going on with the processors that are known");
    loop {
        follower.next().await;
        if let Some(all) = follower.view.all() {
            known.send_replace(Some(all));
        }
    }
}

/// One watch after the other of the pods that hold records.
struct Follower<T: Record> {
    pods: Api<Pod>,
    changes: Changes,
    view: View<T>,
    interruption: Interruption,
}

impl<T: Record> Follower<T> {
    /// - `what`: goes on while the server is away, for the log.
    fn new(pods: Api<Pod>, what: &'static str) -> Self {
        Self {
            changes: Self::changes(&pods),
            pods,
            view: View::default(),
            interruption: Interruption::new(what),
        }
    }

    fn changes(pods: &Api<Pod>) -> Changes {
        access::changes(pods, watcher::Config::default().labels(T::LABEL))
    }

    /// Returns what the next change means for records. Cancel safe.
    async fn next(&mut self) -> Vec<Changed<T>> {
        loop {
            match self.changes.next().await {
                Some(Ok(change)) => {
                    // The first word of a list comes before anything was asked.
                    if !matches!(change, Change::Init) {
                        self.interruption.over();
                    }
                    return self.view.take(change);
                }
                Some(Err(error)) if access::is_expired(&error) => {
                    self.changes = Self::changes(&self.pods);
                }
                other => {
                    let ended = || "the watch ended".to_owned();
                    let error = other.and_then(Result::err);
                    self.interruption
                        .failed(&error.as_ref().map_or_else(ended, why_watch));
                }
            }
            self.interruption.pause().await;
        }
    }
}

/// The records of a pod before a change, and after it.
type Changed<T> = (Records<T>, Records<T>);

/// The records that the listener knows of, by pod.
struct View<T: Record> {
    pods: BTreeMap<String, Records<T>>,
    /// Pods of a list that is not complete yet.
    listed: BTreeMap<String, Records<T>>,
    /// A list was complete once.
    is_complete: bool,
}

impl<T: Record> Default for View<T> {
    fn default() -> Self {
        Self {
            pods: BTreeMap::new(),
            listed: BTreeMap::new(),
            is_complete: false,
        }
    }
}

impl<T: Record> View<T> {
    /// Returns what a change means for records.
    fn take(&mut self, change: Change<Pod>) -> Vec<Changed<T>> {
        match change {
            Change::Apply(pod) => vec![self.set(name(&pod), pod::living(&pod))],
            Change::Delete(pod) => vec![self.set(name(&pod), Records::<T>::new())],
            Change::Init => {
                self.listed.clear();
                Vec::new()
            }
            Change::InitApply(pod) => {
                self.listed.insert(name(&pod), pod::living(&pod));
                Vec::new()
            }
            // What is on no list is gone for good: pods, and with them cards, outlive the API server.
            Change::InitDone => {
                self.is_complete = true;
                let mut listed = std::mem::take(&mut self.listed);
                let names: BTreeSet<String> =
                    self.pods.keys().chain(listed.keys()).cloned().collect();
                let changed = names.into_iter().map(|name| {
                    let now = listed.remove(&name).unwrap_or_default();
                    self.set(name, now)
                });
                changed.collect()
            }
        }
    }

    fn set(&mut self, pod: String, now: Records<T>) -> Changed<T> {
        let before = if now.is_empty() {
            self.pods.remove(&pod)
        } else {
            self.pods.insert(pod, now.clone())
        };
        (before.unwrap_or_default(), now)
    }

    /// Returns all records, once they are known.
    fn all(&self) -> Option<Vec<T>> {
        let records = self.pods.values().flat_map(BTreeMap::values);
        self.is_complete.then(|| records.cloned().collect())
    }
}

fn name(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}
