//! An API server of Kubernetes, played for pods, which a test can kill, start again and have forget.
//!
//! It serves what `kubectl get pods`, `get pods -w` and `annotate pod` need, too, so that its answers can be held against a
//! client that was not written for it. Pods look as those of a 1.33 cluster do (`golden/kubernetes/pod.json`). There is
//! no kubelet: a test says what becomes of containers. It checks no token and no field that nobody here writes.

mod cluster;
mod serve;
mod watch;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use serde_json::{Value, json};
use tempfile::TempDir;

use self::{cluster::Cluster, serve::Running};

/// The namespace that everything is in.
pub const NAMESPACE: &str = "default";

/// One server with a cluster of its own. Dropping it ends it.
pub struct Kubernetes {
    cluster: Arc<Cluster>,
    address: SocketAddr,
    folder: TempDir,
    running: Option<Running>,
}

impl Kubernetes {
    /// Starts a server for a cluster without pods.
    pub async fn start() -> Self {
        let cluster = Arc::new(Cluster::default());
        let running = Running::start(cluster.clone(), ([127, 0, 0, 1], 0).into()).await;
        let kubernetes = Self {
            cluster,
            address: running.address,
            folder: tempfile::tempdir().expect("a folder"),
            running: Some(running),
        };
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "played", "cluster": {"server": kubernetes.url()}}],
            "users": [{"name": "somebody", "user": {}}],
            "contexts": [{
                "name": "played",
                "context": {"cluster": "played", "user": "somebody", "namespace": NAMESPACE},
            }],
            "current-context": "played",
        });
        std::fs::write(kubernetes.config(), config.to_string()).expect("a file");
        kubernetes
    }

    /// Returns where clients reach it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns a file for clients that says so.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// Ends it at once, and with it all connections. The cluster's state stays.
    pub async fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            running.end().await;
        }
    }

    /// Starts it again where it was.
    pub async fn restart(&mut self) {
        self.kill().await;
        self.running = Some(Running::start(self.cluster.clone(), self.address).await);
    }

    /// Runs a pod whose containers run and are ready.
    pub fn run_pod(&self, name: &str, containers: &[&str]) {
        let mut pod = cluster::golden();
        pod["metadata"]["name"] = name.into();
        pod["metadata"]["uid"] = format!("uid-of-{name}-{}", self.cluster.version()).into();
        for [of, list] in [["spec", "containers"], ["status", "containerStatuses"]] {
            let pattern = pod[of][list][0].clone();
            let named = containers.iter().map(|container| {
                let mut one = pattern.clone();
                one["name"] = (*container).into();
                one
            });
            pod[of][list] = named.collect();
        }
        self.cluster.change(name, |_| Some(pod));
        for container in containers {
            self.start_container(name, container);
        }
    }

    /// Ends a container: the kubelet waits before it starts it again.
    pub fn stop_container(&self, pod: &str, container: &str) {
        self.status(pod, container, |status| {
            status["lastState"] = json!({"terminated": {
                "containerID": status["containerID"], "exitCode": 137, "reason": "OOMKilled",
                "startedAt": "2026-11-20T09:14:05Z", "finishedAt": "2026-11-20T09:20:41Z",
            }});
            status["state"] = json!({"waiting": {
                "reason": "CrashLoopBackOff",
                "message": format!("back-off 10s restarting failed container={container} pod={pod}"),
            }});
            status["ready"] = false.into();
            status["started"] = false.into();
        });
    }

    /// Starts another life of a container.
    pub fn start_container(&self, pod: &str, container: &str) {
        let life = self.cluster.version();
        self.status(pod, container, |status| {
            status["containerID"] = format!("containerd://{container}-{life}").into();
            status["restartCount"] =
                (status["restartCount"].as_u64().unwrap_or_default() + 1).into();
            status["state"] = json!({"running": {"startedAt": "2026-11-20T09:20:52Z"}});
            status["ready"] = true.into();
            status["started"] = true.into();
        });
    }

    /// Says what a container's readiness probe finds.
    pub fn set_ready(&self, pod: &str, container: &str, ready: bool) {
        self.status(pod, container, |status| status["ready"] = ready.into());
    }

    /// Begins to delete a pod, as when a deployment shrinks.
    pub fn begin_delete(&self, pod: &str) {
        self.edit(pod, |pod| {
            pod["metadata"]["deletionTimestamp"] = "2026-11-20T10:00:30Z".into();
            pod["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        });
    }

    /// Deletes a pod for good.
    pub fn delete(&self, pod: &str) {
        self.cluster.change(pod, |_| None);
    }

    /// Changes a pod in whatever way.
    pub fn edit(&self, pod: &str, change: impl FnOnce(&mut Value)) {
        self.cluster.change(pod, |before| {
            let mut pod = before.expect("the pod is there").clone();
            change(&mut pod);
            Some(pod)
        });
    }

    /// Returns a pod as it is.
    pub fn pod(&self, name: &str) -> Value {
        self.cluster.pod(name).expect("the pod is there")
    }

    /// Refuses what roles call by these verbs from now on; none: allows everything.
    pub fn forbid(&self, verbs: &[&str]) {
        self.cluster.forbid(verbs);
    }

    /// Ends all watches, as the server does from time to time.
    pub fn end_watches(&self) {
        self.cluster.end_watches();
    }

    /// Forgets what changed until now: who has seen less must list anew.
    pub fn forget(&self) {
        self.cluster.forget();
    }

    /// Returns how many patches were written.
    pub fn writes(&self) -> u64 {
        self.cluster.writes()
    }

    /// Returns how many lists were asked for.
    pub fn lists(&self) -> u64 {
        self.cluster.lists()
    }

    fn status(&self, pod: &str, container: &str, change: impl FnOnce(&mut Value)) {
        self.edit(pod, |pod| {
            let statuses = pod["status"]["containerStatuses"].as_array_mut();
            let mut statuses = statuses.expect("containers").iter_mut();
            let status = statuses.find(|status| status["name"] == container);
            change(status.expect("the container is there"));
        });
    }
}
