//! What a child says of itself over its system routes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A status page is a few hundred bytes, a page of 256 workers some 200 KB; anything far beyond is not one.
const MAX_BODY: usize = 4 << 20;
const TIMEOUT: Duration = Duration::from_secs(2);

/// What `GET /status` of a process answers. Every key may be missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Its id in discovery; a processor has none.
    pub(crate) worker: Option<String>,
    /// `processor`, `agg`, ...
    pub(crate) role: String,
    /// `starting`, `ready`, `draining`, `dead`.
    pub(crate) state: String,
    /// What a starting worker is doing ("loading weights, 42 %").
    pub(crate) phase: Option<String>,
    /// How far it is with that, 0 to 1, for programs that read `stator status --json`.
    pub(crate) progress: Option<f32>,
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    /// Share of KV blocks in use, 0 to 1.
    pub(crate) kv_usage: f32,
    /// Tokens generated since the process started.
    pub(crate) generated_tokens: u64,
    /// The models it serves; a processor names those that answer.
    pub(crate) models: Vec<String>,
}

impl Status {
    pub(crate) fn is_ready(&self) -> bool {
        self.state == "ready"
    }
}

/// Asks processes how they are. Keeps its connections.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Probe {
    pub(crate) fn new() -> Probe {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Probe {
            client: Client::builder(TokioExecutor::new()).build(connector),
        }
    }

    /// Reads the status at `base`; `None` while the process does not answer.
    pub(crate) async fn status(&self, base: &str) -> Option<Status> {
        self.read(base, "status").await
    }

    /// Reads what the processor at `base` knows of workers; nothing while it does not answer.
    pub(crate) async fn workers(&self, base: &str) -> Known {
        let page: Option<Workers> = self.read(base, "workers").await;
        let Some(Workers { models, unused }) = page else {
            return Known::default();
        };
        let targets = models.into_iter().flat_map(|model| model.targets);
        Known {
            ready: targets
                .filter(|target| target.connection == "ready")
                .map(|target| target.worker)
                .collect(),
            refused: unused
                .into_iter()
                .filter(|unused| !unused.passing)
                .map(|unused| (unused.worker, unused.reason))
                .collect(),
        }
    }

    async fn read<T: DeserializeOwned>(&self, base: &str, page: &str) -> Option<T> {
        let uri = format!("{base}/{page}").parse().ok()?;
        let read = async {
            let response = self.client.get(uri).await.ok()?;
            let body = Limited::new(response.into_body(), MAX_BODY);
            let bytes = body.collect().await.ok()?.to_bytes();
            serde_json::from_slice(&bytes).ok()
        };
        tokio::time::timeout(TIMEOUT, read).await.ok()?
    }
}

/// What a processor knows of workers, by their ids.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Those that it can send requests to.
    pub(crate) ready: HashSet<String>,
    /// Those that it will not use, and why.
    pub(crate) refused: HashMap<String, String>,
}

/// What is read of a processor's `GET /workers`.
#[derive(Deserialize)]
struct Workers {
    models: Vec<Model>,
    unused: Vec<Unused>,
}

#[derive(Deserialize)]
struct Unused {
    worker: String,
    reason: String,
    passing: bool,
}

#[derive(Deserialize)]
struct Model {
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    worker: String,
    connection: String,
}
