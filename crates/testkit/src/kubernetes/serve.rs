//! The routes: lists and patches of pods, and what a client asks before.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::{JoinHandle, JoinSet},
};

use super::{
    NAMESPACE,
    cluster::{Cluster, Refusal},
    watch::watch,
};

/// A server that runs. Dropping it ends it and its connections.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    pub(super) async fn start(cluster: Arc<Cluster>, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("the port is free");
        let address = listener.local_addr().expect("an address");
        let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let routes = Router::new()
            .route(
                "/version",
                get(async || Json(json!({"major": "1", "minor": "33", "gitVersion": "v1.33.1"}))),
            )
            .route(
                "/api",
                get(async || Json(json!({"kind": "APIVersions", "versions": ["v1"]}))),
            )
            .route(
                "/apis",
                get(async || {
                    Json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []}))
                }),
            )
            .route("/api/v1", get(resources))
            .route(&pods, get(list_or_watch))
            .route(&format!("{pods}/{{name}}"), get(one).patch(patch))
            .with_state(cluster);
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            // Its drop ends the connections.
            let mut connections = JoinSet::new();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = &mut stopped => break,
                };
                let Ok((socket, _)) = accepted else { break };
                let service = TowerToHyperService::new(routes.clone());
                connections.spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    // A client that leaves is no error.
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
            drop(listener);
            connections.shutdown().await;
        });
        Self {
            address,
            stop: Some(stop),
            task,
        }
    }

    /// Ends it and its connections, and waits until they have ended.
    pub(super) async fn end(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let _ = (&mut self.task).await;
    }
}

async fn resources() -> Json<Value> {
    Json(json!({
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [{
            "name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod",
            "verbs": ["get", "list", "patch", "watch"], "shortNames": ["po"],
        }],
    }))
}

/// What a list, a watch or a patch may say.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Asked {
    watch: String,
    label_selector: String,
    field_selector: String,
    pub(super) resource_version: String,
    pub(super) timeout_seconds: Option<u64>,
    pub(super) allow_watch_bookmarks: bool,
    limit: Option<usize>,
    #[serde(rename = "continue")]
    continue_: String,
    dry_run: String,
}

impl Asked {
    fn is_watch(&self) -> bool {
        self.watch == "1" || self.watch == "true"
    }

    pub(super) fn matches(&self, pod: &Value) -> bool {
        let labels = self
            .label_selector
            .split(',')
            .filter(|part| !part.is_empty());
        let has_labels = labels.into_iter().all(|part| match part.split_once('=') {
            Some((name, value)) => pod["metadata"]["labels"][name] == value,
            None => pod["metadata"]["labels"].get(part).is_some(),
        });
        let name = self.field_selector.strip_prefix("metadata.name=");
        has_labels && name.is_none_or(|name| pod["metadata"]["name"] == name)
    }
}

async fn list_or_watch(
    State(cluster): State<Arc<Cluster>>,
    Query(asked): Query<Asked>,
) -> Response {
    let verb = if asked.is_watch() { "watch" } else { "list" };
    if cluster.is_forbidden(verb) {
        return forbidden("pods", verb);
    }
    if asked.is_watch() {
        return watch(cluster, asked);
    }
    let (pods, version) = cluster.list();
    let pods: Vec<Value> = pods.into_iter().filter(|pod| asked.matches(pod)).collect();
    let from = asked.continue_.parse().unwrap_or(0).min(pods.len());
    let to = asked
        .limit
        .filter(|limit| *limit > 0)
        .map_or(pods.len(), |limit| (from + limit).min(pods.len()));
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if to < pods.len() {
        metadata["continue"] = to.to_string().into();
        metadata["remainingItemCount"] = (pods.len() - to).into();
    }
    // Items of a list name neither kind nor version.
    let items = pods[from..to].iter().cloned().map(|mut pod| {
        let fields = pod.as_object_mut().expect("an object");
        fields.remove("kind");
        fields.remove("apiVersion");
        pod
    });
    let items: Vec<Value> = items.collect();
    Json(json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items}))
        .into_response()
}

async fn one(State(cluster): State<Arc<Cluster>>, Path(name): Path<String>) -> Response {
    if cluster.is_forbidden("get") {
        return forbidden(&format!("pods \"{name}\""), "get");
    }
    match cluster.pod(&name) {
        Some(pod) => Json(pod).into_response(),
        None => refused(&Refusal {
            code: 404,
            reason: "NotFound",
            message: format!("pods \"{name}\" not found"),
        }),
    }
}

async fn patch(
    State(cluster): State<Arc<Cluster>>,
    Path(name): Path<String>,
    Query(asked): Query<Asked>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if cluster.is_forbidden("patch") {
        return forbidden(&format!("pods \"{name}\""), "patch");
    }
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    if kind != Some(b"application/merge-patch+json") {
        return refused(&Refusal {
            code: 415,
            reason: "UnsupportedMediaType",
            message: "only application/merge-patch+json is played here".to_owned(),
        });
    }
    let Ok(patch) = serde_json::from_slice(&body) else {
        return refused(&Refusal {
            code: 400,
            reason: "BadRequest",
            message: "error decoding patch".to_owned(),
        });
    };
    match cluster.patch(&name, &patch, asked.dry_run == "All") {
        Ok(pod) => Json(pod).into_response(),
        Err(refusal) => refused(&refusal),
    }
}

fn forbidden(what: &str, verb: &str) -> Response {
    refused(&Refusal {
        code: 403,
        reason: "Forbidden",
        message: format!(
            "{what} is forbidden: User \"system:serviceaccount:{NAMESPACE}:stator\" cannot {verb} resource \"pods\" \
             in API group \"\" in the namespace \"{NAMESPACE}\""
        ),
    })
}

fn refused(refusal: &Refusal) -> Response {
    let code = StatusCode::from_u16(refusal.code).expect("a status");
    (code, Json(status(refusal))).into_response()
}

pub(super) fn status(refusal: &Refusal) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": refusal.message, "reason": refusal.reason, "code": refusal.code,
    })
}
