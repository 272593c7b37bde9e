//! One watch: what happens to pods, told a line at a time.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, sleep_until},
};

use super::{
    cluster::{Change, Cluster, Refusal},
    serve::{Asked, status},
};

/// How often a watch is told where the cluster is. Sooner than a real one's minute, so that tests see it.
const BOOKMARK_EVERY: Duration = Duration::from_millis(200);

/// How long a watch lasts that does not say.
const WATCH_FOR: Duration = Duration::from_secs(1800);

/// One watch, between two lines.
struct Watch {
    cluster: Arc<Cluster>,
    asked: Asked,
    signal: Receiver<u64>,
    /// The latest version that was told.
    version: u64,
    lines: VecDeque<Value>,
    /// As many times watches had been ended when this one began.
    ended: u64,
    until: Instant,
    bookmark: Instant,
    is_over: bool,
}

/// Answers with what happens to pods, a line for each change.
pub(super) fn watch(cluster: Arc<Cluster>, asked: Asked) -> Response {
    let mut lines = VecDeque::new();
    let version = match asked.resource_version.as_str() {
        // From what is there.
        "" | "0" => {
            let (pods, version) = cluster.list();
            let pods = pods.into_iter().filter(|pod| asked.matches(pod));
            lines.extend(pods.map(|pod| json!({"type": "ADDED", "object": pod})));
            version
        }
        version => version.parse().unwrap_or(0),
    };
    let seconds = asked.timeout_seconds.map_or(WATCH_FOR, Duration::from_secs);
    let watch = Watch {
        signal: cluster.signal(),
        ended: cluster.ended(),
        cluster,
        asked,
        version,
        lines,
        until: Instant::now() + seconds,
        bookmark: Instant::now() + BOOKMARK_EVERY,
        is_over: false,
    };
    let lines = stream::unfold(watch, async |mut watch| {
        let line = watch.line().await?;
        Some((Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))), watch))
    });
    (
        [(CONTENT_TYPE, "application/json")],
        Body::from_stream(lines.boxed()),
    )
        .into_response()
}

impl Watch {
    /// Returns the next line; absent when the watch is over.
    async fn line(&mut self) -> Option<Value> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            if self.is_over || self.cluster.ended() != self.ended {
                return None;
            }
            self.signal.borrow_and_update();
            match self.cluster.after(self.version) {
                Err(oldest) => {
                    self.is_over = true;
                    let message = format!("too old resource version: {} ({oldest})", self.version);
                    let refusal = Refusal {
                        code: 410,
                        reason: "Expired",
                        message,
                    };
                    self.lines
                        .push_back(json!({"type": "ERROR", "object": status(&refusal)}));
                    continue;
                }
                Ok(changes) if !changes.is_empty() => {
                    for change in changes {
                        self.version = change.version;
                        self.lines.extend(self.told(change));
                    }
                    continue;
                }
                Ok(_) => {}
            }
            let bookmark = self.bookmark;
            tokio::select! {
                _ = self.signal.changed() => {}
                () = sleep_until(self.until) => self.is_over = true,
                () = sleep_until(bookmark), if self.asked.allow_watch_bookmarks => {
                    self.bookmark += BOOKMARK_EVERY;
                    return Some(json!({"type": "BOOKMARK", "object": {
                        "kind": "Pod", "apiVersion": "v1",
                        "metadata": {"resourceVersion": self.version.to_string(), "creationTimestamp": null},
                        "spec": {"containers": null}, "status": {},
                    }}));
                }
            }
        }
    }

    /// Returns what a change is to who sees only some pods.
    fn told(&self, change: Change) -> Option<Value> {
        let version = change.version.to_string();
        let before = change.before.filter(|pod| self.asked.matches(pod));
        let after = change.after.filter(|pod| self.asked.matches(pod));
        let (kind, mut pod) = match (before, after) {
            (None, None) => return None,
            (None, Some(pod)) => ("ADDED", pod),
            (Some(_), Some(pod)) => ("MODIFIED", pod),
            (Some(pod), None) => ("DELETED", pod),
        };
        pod["metadata"]["resourceVersion"] = version.into();
        Some(json!({"type": kind, "object": pod}))
    }
}
