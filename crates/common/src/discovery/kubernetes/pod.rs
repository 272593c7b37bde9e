//! What a pod says of its workers and processors, and which of them live.

use std::collections::BTreeMap;

use kube::{
    Api, Client,
    core::{ApiResource, NotUsed, Object},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;

use crate::{
    Card,
    discovery::{DiscoveryError, Peer, owner::Owner},
    ids::WorkerId,
};

/// What a process says of itself on its pod.
pub(super) trait Record:
    Clone + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// What is it called by.
    type Id: Clone + Ord + Send + Sync;
    /// What to call such a process when telling people of it.
    const KIND: &'static str;
    /// The label of pods that hold some; its value says nothing.
    const LABEL: &'static str;
    /// What the names of their annotations begin with; the id follows.
    const ANNOTATION: &'static str;
    /// It counts only where it may be sent work: while its container is ready, and its pod is not being deleted.
    const TAKES_WORK: bool;

    fn id(&self) -> &Self::Id;

    /// Returns the id as text.
    fn name(&self) -> &str;
}

impl Record for Card {
    type Id = WorkerId;
    const KIND: &'static str = "worker";
    const LABEL: &'static str = "stator.dev/worker";
    const ANNOTATION: &'static str = "stator.dev/card.";
    const TAKES_WORK: bool = true;

    fn id(&self) -> &WorkerId {
        &self.worker
    }

    fn name(&self) -> &str {
        &self.worker.0
    }
}

impl Record for Peer {
    type Id = String;
    const KIND: &'static str = "processor";
    const LABEL: &'static str = "stator.dev/processor";
    const ANNOTATION: &'static str = "stator.dev/processor.";
    /// What it has booked is there until it ends, whether or not it takes more.
    const TAKES_WORK: bool = false;

    fn id(&self) -> &String {
        &self.name
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Characters of an annotation's name after the slash, at most (Kubernetes, `labels and annotations`).
const NAME_LIMIT: usize = 63;

/// A pod, as far as is read of it.
pub(super) type Pod = Object<NotUsed, Status>;

/// `PodStatus`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    #[serde(default)]
    phase: String,
    #[serde(default)]
    container_statuses: Vec<ContainerStatus>,
}

/// `ContainerStatus`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStatus {
    name: String,
    /// Another one after each start of the container, `containerd://..`.
    #[serde(default, rename = "containerID")]
    container_id: String,
    /// Its readiness probe succeeds, or it has none and runs.
    #[serde(default)]
    ready: bool,
    #[serde(default)]
    state: ContainerState,
}

/// `ContainerState`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ContainerState {
    running: Option<NotUsed>,
}

/// One life of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) id: String,
}

/// What an annotation holds: the record, and whose process it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry<T> {
    pub(super) container: Container,
    pub(super) owner: Owner,
    #[serde(rename = "card")]
    pub(super) record: T,
}

/// Returns how the pods of a namespace are asked for.
pub(super) fn api(client: Client, namespace: &str) -> Api<Pod> {
    let pods = ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&());
    Api::namespaced_with(client, namespace, &pods)
}

/// Returns the name of a record's annotation.
///
/// # Errors
/// [`DiscoveryError::Name`]: the id cannot be part of one.
pub(super) fn annotation<T: Record>(record: &T) -> Result<String, DiscoveryError> {
    let id = record.name();
    let name = format!("{}{id}", T::ANNOTATION);
    let after_slash = name.split_once('/').map_or("", |(_, after)| after);
    let ends_well = id.bytes().last().is_some_and(|b| b.is_ascii_alphanumeric());
    let bytes_fit = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_' || b == b'.';
    if after_slash.len() > NAME_LIMIT || !ends_well || !id.bytes().all(bytes_fit) {
        return Err(DiscoveryError::Name(id.to_owned()));
    }
    Ok(name)
}

/// Returns the records that a pod holds, by the names of their annotations.
pub(super) fn entries<T: Record>(pod: &Pod) -> impl Iterator<Item = (&str, Entry<T>)> {
    let annotations = pod.metadata.annotations.iter().flatten();
    annotations.filter_map(|(name, value)| {
        let id = name.strip_prefix(T::ANNOTATION)?;
        let entry = serde_json::from_str::<Entry<T>>(value).inspect_err(|error| {
            warn!(pod = pod.metadata.name, name, %error, "not the card of a {}", T::KIND);
        });
        let entry = entry.ok().filter(|entry| entry.record.name() == id)?;
        Some((name.as_str(), entry))
    })
}

/// Records by what they are called by.
pub(super) type Records<T> = BTreeMap<<T as Record>::Id, T>;

/// Returns the records of a pod whose processes live: their container still is the one that they started in and runs. A
/// pod that has ended has none. Those that take work count while the container is ready and the pod is not being deleted.
///
/// Readiness is the container's and not the pod's: a neighbour that is not ready takes no worker away.
pub(super) fn living<T: Record>(pod: &Pod) -> Records<T> {
    let ended = pod
        .status
        .as_ref()
        .is_some_and(|status| status.phase == "Succeeded" || status.phase == "Failed");
    if ended || (T::TAKES_WORK && is_leaving(pod)) {
        return Records::<T>::new();
    }
    entries::<T>(pod)
        .filter(|(_, entry)| {
            let status = status_of(pod, &entry.container.name);
            status.is_some_and(|status| {
                (status.ready || !T::TAKES_WORK) && status.id() == Some(&entry.container.id)
            })
        })
        .map(|(_, entry)| (entry.record.id().clone(), entry.record))
        .collect()
}

/// Says whether a pod is being deleted.
pub(super) fn is_leaving(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Why it is not clear which container of a pod this process runs in.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoContainer {
    /// The kubelet has not told yet.
    #[error("the kubelet does not yet say that container '{0}' runs")]
    NotYet(String),
    /// Nothing tells which one it is.
    #[error(
        "which container is this process in? The pod has {0}: set --kubernetes-container, or CONTAINER_NAME in the \
         container's environment"
    )]
    Several(String),
    /// It is none of the pod's.
    #[error(
        "the pod has no container '{named}', but {there}: check --kubernetes-container (CONTAINER_NAME)"
    )]
    Another {
        /// As set.
        named: String,
        /// The pod's.
        there: String,
    },
}

/// Returns the life of the container that this process runs in: the one that is named, or the pod's only one.
pub(super) fn own_container(pod: &Pod, named: Option<&str>) -> Result<Container, NoContainer> {
    let statuses = pod
        .status
        .as_ref()
        .map_or(&[][..], |status| &status.container_statuses);
    let there = || {
        statuses
            .iter()
            .map(|status| status.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let status = match (named, statuses) {
        (named, []) => return Err(NoContainer::NotYet(named.unwrap_or_default().to_owned())),
        (None, [one]) => one,
        (None, _) => return Err(NoContainer::Several(there())),
        (Some(named), _) => statuses
            .iter()
            .find(|status| status.name == named)
            .ok_or_else(|| NoContainer::Another {
                named: named.to_owned(),
                there: there(),
            })?,
    };
    match status.id() {
        Some(id) => Ok(Container {
            name: status.name.clone(),
            id: id.to_owned(),
        }),
        None => Err(NoContainer::NotYet(status.name.clone())),
    }
}

fn status_of<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let statuses = &pod.status.as_ref()?.container_statuses;
    statuses.iter().find(|status| status.name == container)
}

impl ContainerStatus {
    /// Returns which life of the container runs.
    fn id(&self) -> Option<&str> {
        let running = self.state.running.is_some() && !self.container_id.is_empty();
        running.then_some(&*self.container_id)
    }
}
