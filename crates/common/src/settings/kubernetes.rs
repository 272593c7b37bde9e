//! How Kubernetes is reached, and who asks, for every role alike.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How Kubernetes is reached; the table `[kubernetes]` of a configuration file.
///
/// The last three say which pod this process runs in. Workers write to it, and processors that tell each other what they
/// booked; others need not know.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesSettings {
    /// Namespace of the cluster in which the pods are [default: the one that this process runs in].
    #[arg(
        id = "kubernetes_namespace",
        long = "kubernetes-namespace",
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,

    /// File that says where the cluster is and who asks, as for kubectl [default: the pod's service account; outside
    /// of a cluster KUBECONFIG or ~/.kube/config].
    #[arg(
        id = "kubernetes_config",
        long = "kubernetes-config",
        value_name = "FILE",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,

    /// Pod that this process runs in.
    #[arg(
        id = "kubernetes_pod",
        long = "kubernetes-pod",
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,

    /// What tells that pod from another one of the same name [default: whichever has the name at the start].
    #[arg(
        id = "kubernetes_pod_uid",
        long = "kubernetes-pod-uid",
        value_name = "UID",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,

    /// Container that this process runs in [default: the pod's only one].
    #[arg(
        id = "kubernetes_container",
        long = "kubernetes-container",
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

impl KubernetesSettings {
    /// Says whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
