//! What requests find: the models and adapters of one moment, each under its names.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::group::{Group, GroupState, Refused};
use super::{Model, Unused};

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
