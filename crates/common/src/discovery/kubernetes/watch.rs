//! Follows the workers on all pods, across interruptions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::StreamExt;
use kube::runtime::watcher::{self, Event as Change};
use tokio::sync::mpsc;

use super::{
    Place,
    access::{self, Changes, Interruption, why_watch},
    pod::{self, Pod},
};
use crate::{
    Card,
    discovery::{Event, difference},
    ids::WorkerId,
};

/// Sends what happens to workers until nobody listens.
pub(super) async fn follow(place: Arc<Place>, sender: mpsc::Sender<Event>) {
    let changes = || -> Changes {
        let labelled = watcher::Config::default().labels(pod::LABEL);
        access::changes(&place.pods, labelled)
    };
    let mut view = View::default();
    let mut interruption = Interruption::new("going on with the workers that are known");
    let mut stream = changes();
    loop {
        let change = tokio::select! {
            change = stream.next() => change,
            () = sender.closed() => return,
        };
        match change {
            Some(Ok(change)) => {
                // The first word of a list comes before anything was asked.
                if !matches!(change, Change::Init) {
                    interruption.over();
                }
                for event in view.take(change) {
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
            }
            Some(Err(error)) if access::is_expired(&error) => {
                stream = changes();
                tokio::select! {
                    () = interruption.pause() => {}
                    () = sender.closed() => return,
                }
            }
            other => {
                let ended = || "the watch ended".to_owned();
                let error = other.and_then(Result::err);
                interruption.failed(&error.as_ref().map_or_else(ended, why_watch));
                tokio::select! {
                    () = interruption.pause() => {}
                    () = sender.closed() => return,
                }
            }
        }
    }
}

type Workers = BTreeMap<WorkerId, Card>;

/// The workers that the listener knows of, by pod.
#[derive(Default)]
struct View {
    pods: BTreeMap<String, Workers>,
    /// Pods of a list that is not complete yet.
    listed: BTreeMap<String, Workers>,
}

impl View {
    /// Returns what a change means for workers.
    fn take(&mut self, change: Change<Pod>) -> Vec<Event> {
        match change {
            Change::Apply(pod) => self.set(name(&pod), pod::living(&pod)),
            Change::Delete(pod) => self.set(name(&pod), Workers::new()),
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
                let mut listed = std::mem::take(&mut self.listed);
                let names: BTreeSet<String> =
                    self.pods.keys().chain(listed.keys()).cloned().collect();
                let events = names.into_iter().flat_map(|name| {
                    let now = listed.remove(&name).unwrap_or_default();
                    self.set(name, now)
                });
                events.collect()
            }
        }
    }

    fn set(&mut self, pod: String, now: Workers) -> Vec<Event> {
        let before = self.pods.remove(&pod).unwrap_or_default();
        let events = difference(&before, &now);
        if !now.is_empty() {
            self.pods.insert(pod, now);
        }
        events
    }
}

fn name(pod: &Pod) -> String {
    pod.metadata.name.clone().unwrap_or_default()
}
