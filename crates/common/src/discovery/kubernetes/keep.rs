//! Keeps what one process says of itself, a worker's card or a processor's, on the pod that it runs in.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use kube::{
    api::{Patch, PatchParams},
    runtime::watcher::{self, Event},
};
use serde_json::{Map, Value, json};
use tokio::time::{Instant, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    ANSWER_WITHIN, Place,
    access::{self, Changes, Interruption, Verb, is_refusal, why, why_watch},
    pod::{self, Container, Entry, NoContainer, Pod, Record},
};
use crate::discovery::{DiscoveryError, owner::Owner};

/// Who writes, as the API server notes it.
pub(super) const MANAGER: &str = "stator";

/// Two writes are this far apart: somebody else may want the opposite.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// How often it is looked whether a neighbour in the same container has died. Asks the API server nothing.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Why the pod does not hold the card.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// Trying again will not help by itself.
    #[error("{0}")]
    Refused(String),
    /// It may.
    #[error("{0}")]
    Passing(String),
}

impl Trouble {
    pub(super) fn of_call(error: &kube::Error, verb: Verb) -> Self {
        let reason = why(error, verb);
        if is_refusal(error) {
            Self::Refused(reason)
        } else {
            Self::Passing(reason)
        }
    }

    fn of_watch(error: &watcher::Error) -> Self {
        let reason = why_watch(error);
        match error {
            watcher::Error::InitialListFailed(error) if is_refusal(error) => Self::Refused(reason),
            watcher::Error::WatchStartFailed(error) if is_refusal(error) => Self::Refused(reason),
            _ => Self::Passing(reason),
        }
    }
}

/// What one process has on its pod.
pub(super) struct Keeper<T> {
    place: Arc<Place>,
    /// Of the pod.
    name: String,
    /// Of the pod, once that is known: another one of the same name is not this one.
    uid: Option<String>,
    annotation: String,
    record: T,
    changes: Changes,
    /// As it was seen last.
    pod: Option<Pod>,
    /// What may have to be written has not been looked at.
    is_due: bool,
    /// The next write comes no sooner.
    not_before: Instant,
    interruption: Interruption,
    trouble: Trouble,
}

impl<T: Record> Keeper<T> {
    /// - `place`: where the pod is; its settings say which one.
    pub(super) fn new(place: Arc<Place>, record: T) -> Result<Self, DiscoveryError> {
        let name = place.own_pod::<T>()?.to_owned();
        Ok(Self {
            uid: place.settings.pod_uid.clone(),
            annotation: pod::annotation(&record)?,
            record,
            changes: access::changes(&place.pods, one(&name)),
            place,
            name,
            pod: None,
            is_due: false,
            not_before: Instant::now(),
            interruption: Interruption::new("this process stays on its pod as it is"),
            trouble: Trouble::Passing("kubernetes does not answer".to_owned()),
        })
    }

    /// Waits for the pod and writes the card, for the first time.
    pub(super) async fn begin(&mut self) -> Result<(), Trouble> {
        loop {
            let done = match self.next().await {
                Ok(()) => self.write().await,
                Err(trouble) => Err(trouble),
            };
            match done {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(Trouble::Refused(reason)) => return Err(Trouble::Refused(reason)),
                Err(trouble) => {
                    self.interruption.failed(&trouble.to_string());
                    self.trouble = trouble;
                    self.interruption.pause().await;
                }
            }
        }
    }

    /// Returns what was in the way last.
    pub(super) fn last_trouble(&self) -> Trouble {
        self.trouble.clone()
    }

    /// Keeps the card until `stop`, and takes it back then.
    pub(super) async fn keep(mut self, stop: CancellationToken) {
        let mut look = interval(LOOK_EVERY);
        while !stop.is_cancelled() {
            let not_before = self.not_before;
            let seen = tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(not_before), if self.is_due => Ok(()),
                seen = self.next() => seen,
                _ = look.tick() => {
                    self.is_due = self.pod.is_some();
                    Ok(())
                }
            };
            // A write is not given up half way: what would come of it then could come after the card is taken back.
            let done = match seen {
                Ok(()) if self.is_due && Instant::now() >= self.not_before => self.write().await,
                Ok(()) => Ok(true),
                Err(trouble) => Err(trouble),
            };
            if let Err(trouble) = done {
                self.interruption.failed(&trouble.to_string());
                tokio::select! {
                    () = self.interruption.pause() => {}
                    () = stop.cancelled() => break,
                }
            }
        }
        self.leave().await;
    }

    /// Waits for a change of the pod. Cancel safe.
    async fn next(&mut self) -> Result<(), Trouble> {
        match self.changes.next().await {
            Some(Ok(event)) => {
                // The first word of a list comes before anything was asked.
                if !matches!(event, Event::Init) {
                    self.interruption.over();
                }
                match event {
                    Event::Apply(pod) | Event::InitApply(pod) => {
                        self.pod = Some(pod);
                        self.is_due = true;
                    }
                    Event::Delete(_) | Event::Init => self.pod = None,
                    Event::InitDone if self.pod.is_none() => {
                        return Err(Trouble::Refused(format!(
                            "there is no pod '{}': check POD_NAME (--kubernetes-pod) and POD_NAMESPACE \
                             (--kubernetes-namespace)",
                            self.name
                        )));
                    }
                    Event::InitDone => {}
                }
                Ok(())
            }
            Some(Err(error)) if access::is_expired(&error) => {
                self.changes = access::changes(&self.place.pods, one(&self.name));
                self.interruption.pause().await;
                Ok(())
            }
            Some(Err(error)) => Err(Trouble::of_watch(&error)),
            None => Err(Trouble::Passing("the watch of the pod ended".to_owned())),
        }
    }

    /// Writes what the pod lacks; says whether it now holds the card.
    async fn write(&mut self) -> Result<bool, Trouble> {
        self.is_due = false;
        let Some(pod) = &self.pod else {
            return Ok(false);
        };
        if pod::is_leaving(pod) {
            return Ok(false);
        }
        let uid = pod.metadata.uid.clone();
        if *self
            .uid
            .get_or_insert_with(|| uid.clone().unwrap_or_default())
            != uid.unwrap_or_default()
        {
            return Err(Trouble::Refused(format!(
                "pod '{}' is another one than this process's ({}): check POD_UID (--kubernetes-pod-uid)",
                self.name,
                self.uid.as_deref().unwrap_or_default()
            )));
        }
        let container = match pod::own_container(pod, self.place.settings.container.as_deref()) {
            Ok(container) => container,
            // The kubelet's word comes as a change of the pod.
            Err(reason @ NoContainer::NotYet(_)) => {
                self.trouble = Trouble::Passing(reason.to_string());
                return Ok(false);
            }
            Err(reason) => return Err(Trouble::Refused(reason.to_string())),
        };
        let annotations = self.missing(pod, container)?;
        let is_labelled = pod
            .metadata
            .labels
            .iter()
            .flatten()
            .any(|(name, _)| name == T::LABEL);
        if annotations.is_empty() && is_labelled {
            return Ok(true);
        }
        self.not_before = Instant::now() + WRITE_EVERY;
        // Until it is known to have worked.
        self.is_due = true;
        let written = self.patch(annotations).await?;
        self.pod = Some(written);
        self.is_due = false;
        Ok(true)
    }

    /// Returns the annotations to write: this process's where it is not as it should be, and those of dead processes.
    fn missing(&self, pod: &Pod, container: Container) -> Result<Map<String, Value>, Trouble> {
        let mut annotations = Map::new();
        for (name, entry) in pod::entries::<T>(pod) {
            let is_neighbour = entry.container.name == container.name && name != self.annotation;
            if is_neighbour && (entry.container.id != container.id || entry.owner.is_dead()) {
                let id = entry.record.name();
                info!(
                    id,
                    "removing the card of a {} that died in this container",
                    T::KIND
                );
                annotations.insert(name.to_owned(), Value::Null);
            }
        }
        let entry = Entry {
            container,
            owner: Owner::this_process(),
            record: self.record.clone(),
        };
        let text = serde_json::to_string(&entry);
        let text = text.map_err(|error| Trouble::Refused(error.to_string()))?;
        let mut there = pod.metadata.annotations.iter().flatten();
        if !there.any(|(name, value)| *name == self.annotation && *value == text) {
            annotations.insert(self.annotation.clone(), Value::String(text));
        }
        Ok(annotations)
    }

    async fn patch(&mut self, annotations: Map<String, Value>) -> Result<Pod, Trouble> {
        let patch = json!({
            // The server refuses a patch of another pod that has the same name by now.
            "metadata": {"uid": self.uid, "labels": {T::LABEL: "true"}, "annotations": annotations}
        });
        let manager = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let merge = Patch::Merge(&patch);
        let patched = self.place.pods.patch(&self.name, &manager, &merge);
        match timeout(ANSWER_WITHIN, patched).await {
            Ok(Ok(pod)) => Ok(pod),
            Ok(Err(error)) => Err(Trouble::of_call(&error, Verb::Patch)),
            Err(_) => Err(Trouble::Passing(format!(
                "no answer for {} s",
                ANSWER_WITHIN.as_secs()
            ))),
        }
    }

    /// Takes the card back, if Kubernetes can be asked.
    async fn leave(mut self) {
        let mut annotations = Map::new();
        annotations.insert(self.annotation.clone(), Value::Null);
        if let Err(reason) = self.patch(annotations).await {
            warn!(%reason, "kubernetes cannot be told that this {} leaves: its card counts until its container ends", T::KIND);
        }
    }
}

fn one(pod: &str) -> watcher::Config {
    watcher::Config::default().fields(&format!("metadata.name={pod}"))
}
