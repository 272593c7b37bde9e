//! What requests find: the models and adapters of one moment, each under its names.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::group::{Group, GroupState, Refused};
use super::{Model, Unused};

/// How long a model whose last worker left is one that may come back. An engine that was lost takes a minute to start
/// again, and a large model several.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The models of one moment.
#[derive(Default)]
pub(super) struct Snapshot {
    /// Each model under each of its names, and each adapter.
    pub(super) by_name: HashMap<String, Arc<Model>>,
    /// Each model once, by id.
    pub(super) models: Vec<Arc<Model>>,
    /// Each adapter once, by name.
    pub(super) adapters: Vec<Arc<Model>>,
    /// Names of models that are still being loaded.
    pub(super) loading: HashSet<String>,
    /// Names of models that cannot be loaded, and why.
    pub(super) failed: HashMap<String, String>,
    pub(super) unused: Vec<Unused>,
    /// Names of models and adapters that were served or loaded and are not served now, and when they last were.
    left: HashMap<String, Instant>,
}

impl Snapshot {
    /// Returns what is served by some groups of workers.
    pub(super) fn of<'a>(
        groups: impl Iterator<Item = &'a Group>,
        refused: impl Iterator<Item = &'a Refused>,
    ) -> Self {
        let mut snapshot = Self::default();
        for group in groups {
            snapshot.add(group);
        }
        snapshot.models.sort_by(|a, b| a.id.cmp(&b.id));
        snapshot.adapters.sort_by(|a, b| a.id.cmp(&b.id));
        snapshot.unused.extend(refused.map(|refused| {
            let names = &refused.card.model.names;
            Unused {
                worker: refused.card.worker.clone(),
                model: names.first().cloned().unwrap_or_default(),
                reason: refused.reason.clone(),
                passing: false,
            }
        }));
        snapshot.unused.sort_by(|a, b| a.worker.cmp(&b.worker));
        snapshot
    }

    /// Adds what was served before and is not now.
    pub(super) fn after(mut self, before: &Self) -> Self {
        let now = Instant::now();
        let left = before.left.iter().map(|(name, at)| (name, *at));
        // One that is being loaded now may leave before it was served.
        let known = before.by_name.keys().chain(&before.loading);
        let leaves = known.map(|name| (name, now));
        self.left = left
            .chain(leaves)
            .filter(|(name, at)| !self.by_name.contains_key(*name) && now - *at < REMEMBERED)
            .map(|(name, at)| (name.clone(), at))
            .collect();
        self
    }

    /// Says whether the last worker that served a model left not long ago.
    pub(super) fn left_lately(&self, name: &str) -> bool {
        let at = self.left.get(name);
        at.is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    /// Says whether no worker serves anything.
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty() && self.loading.is_empty() && self.failed.is_empty()
    }

    fn add(&mut self, group: &Group) {
        let names = group.names().map(str::to_owned);
        match &group.state {
            GroupState::Ready(model) => {
                self.models.push(Arc::clone(model));
                let names = model.card.names.iter().cloned();
                self.by_name
                    .extend(names.map(|name| (name, Arc::clone(model))));
                for adapter in group.adapters().into_values() {
                    let adapted = Arc::new(model.adapted(adapter));
                    self.by_name
                        .insert(adapter.name.clone(), Arc::clone(&adapted));
                    self.adapters.push(adapted);
                }
            }
            GroupState::Loading(_) => {
                self.loading.extend(names);
                self.unused
                    .extend(unused(group, "its model is still being loaded", true));
            }
            GroupState::Failed(reason) => {
                self.failed.extend(names.map(|name| (name, reason.clone())));
                self.unused.extend(unused(group, reason, false));
            }
        }
    }
}

fn unused(group: &Group, reason: &str, passing: bool) -> impl Iterator<Item = Unused> {
    group.workers.iter().map(move |worker| Unused {
        worker: worker.id().clone(),
        model: group.model.names[0].clone(),
        reason: reason.to_owned(),
        passing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loading(name: &str) -> Snapshot {
        Snapshot {
            loading: HashSet::from([name.to_owned()]),
            ..Snapshot::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_comes_and_goes_is_remembered_until_it_stays_away() {
        let there = loading("m").after(&Snapshot::default());
        let gone = loading("other").after(&there);
        assert!(gone.left_lately("m") && !gone.left_lately("n"));
        tokio::time::advance(REMEMBERED / 2).await;
        // It is loaded anew, and leaves before that is done.
        let again = loading("m").after(&gone);
        tokio::time::advance(REMEMBERED / 2).await;
        let gone = loading("other").after(&again);
        assert!(gone.left_lately("m"));
        tokio::time::advance(REMEMBERED).await;
        assert!(!gone.left_lately("m"));
    }
}
