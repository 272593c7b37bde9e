//! A worker on the real request plane, in discovery, without an engine: it does what a test says.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use stator_common::discovery::{Discovery, Registration};
use stator_common::drain::{self, Trigger};
use stator_common::plane::{Connection, Handler, Server, ServerConfig, ServerHandle};
use stator_common::proto::worker::{Delta, FinishReason, GenerateRequest, Sampling};
use stator_common::{BlobHash, Card, WorkerId};

use crate::card;
use crate::model::{self, Files};

/// What a worker does with its requests.
pub trait Script: Send + Sync + 'static {
    /// A request has come.
    fn submitted(&self, attempt: Attempt);

    /// The processor has given up the request of this stream.
    fn cancelled(&self, _stream: u32) {}
}

impl<F: Fn(Attempt) + Send + Sync + 'static> Script for F {
    fn submitted(&self, attempt: Attempt) {
        self(attempt);
    }
}

/// A worker that is served and registered, until it is dropped.
pub struct Worker {
    counts: Arc<Counts>,
    registration: Option<Registration>,
    server: Option<ServerHandle>,
    _trigger: Trigger,
}

#[derive(Default)]
struct Counts {
    submitted: AtomicU32,
    cancelled: AtomicU32,
}

impl Worker {
    /// Starts a worker named `id` of [the model](crate::model).
    pub async fn start(discovery: &impl Discovery, id: &str, script: impl Script) -> Self {
        Self::customized(discovery, id, script, |_| {}).await
    }

    /// Starts a worker whose card is changed before it is published.
    pub async fn customized(
        discovery: &impl Discovery,
        id: &str,
        script: impl Script,
        change: impl FnOnce(&mut Card),
    ) -> Self {
        let worker = WorkerId(id.to_owned());
        let address = "127.0.0.1:0".parse().expect("an address");
        let server = Server::bind(address, ServerConfig::new(worker.clone())).expect("a free port");
        let files = model::files();
        let mut card = Card {
            address: server.address().expect("a bound socket").to_string(),
            model: model::card(&files),
            ..card::card(id)
        };
        change(&mut card);
        let counts = Arc::new(Counts::default());
        let player = Player {
            script,
            files,
            counts: Arc::clone(&counts),
        };
        let (trigger, drain) = drain::channel();
        let server = server.spawn(Arc::new(player), drain);
        let registration = discovery.register(card).await.expect("memory has room");
        Self {
            counts,
            registration: Some(registration),
            server: Some(server),
            _trigger: trigger,
        }
    }

    /// Leaves discovery and closes every connection.
    pub async fn stop(mut self) {
        self.registration.take();
        self.disconnect().await;
    }

    /// Closes every connection and takes no new one, but stays in discovery.
    pub async fn disconnect(&mut self) {
        if let Some(server) = self.server.take() {
            server.close().await;
        }
    }

    /// Returns how many requests have come.
    pub fn submitted(&self) -> u32 {
        self.counts.submitted.load(Ordering::SeqCst)
    }

    /// Returns how many requests the processor has given up.
    pub fn cancelled(&self) -> u32 {
        self.counts.cancelled.load(Ordering::SeqCst)
    }
}

/// Plays a script over the plane.
struct Player<S> {
    script: S,
    files: Files,
    counts: Arc<Counts>,
}

impl<S: Script> Handler for Player<S> {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        self.counts.submitted.fetch_add(1, Ordering::SeqCst);
        self.script.submitted(Attempt {
            connection: Arc::clone(connection),
            stream,
            request,
        });
    }

    fn cancel(&self, _: &Arc<Connection>, stream: u32) {
        self.counts.cancelled.fetch_add(1, Ordering::SeqCst);
        self.script.cancelled(stream);
    }

    fn closed(&self, _: &Arc<Connection>) {}

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        let mut files = self.files.values();
        files.find(|bytes| BlobHash::of(bytes) == *hash).cloned()
    }
}

/// A request that the worker has received.
pub struct Attempt {
    connection: Arc<Connection>,
    pub stream: u32,
    pub request: GenerateRequest,
}

impl Attempt {
    /// Sends a delta of this request.
    pub fn send(&self, delta: Delta) {
        let mut deltas = vec![Delta {
            stream: self.stream,
            ..delta
        }];
        self.connection.send(&mut deltas, None);
    }

    /// Generates the tokens of a text.
    pub fn say(&self, text: &str) {
        self.send(Delta {
            tokens: model::tokens(text),
            ..Delta::default()
        });
    }

    /// Ends with the end-of-sequence token.
    pub fn end(&self) {
        self.finish(&[model::END], FinishReason::Stop);
    }

    /// Ends with these tokens.
    pub fn finish(&self, tokens: &[u32], reason: FinishReason) {
        self.send(Delta {
            tokens: tokens.to_vec(),
            finish: reason.into(),
            ..Delta::default()
        });
    }

    pub fn sampling(&self) -> &Sampling {
        let sampling = self.request.sampling.as_ref();
        sampling.expect("every request has sampling parameters")
    }

    /// Returns the prompt as text.
    pub fn prompt(&self) -> String {
        let words = self.request.prompt_tokens.chunks_exact(4);
        let bytes = words.map(|word| word[0]).collect();
        String::from_utf8(bytes).expect("the prompt is text")
    }
}
