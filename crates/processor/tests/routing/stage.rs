//! A processor with workers that answer at once and say how much of each prompt they had cached.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use stator_common::events::{Blocks, Change, Medium, ViewId};
use stator_common::proto::worker::{Delta, FinishReason};
use stator_common::{Card, WorkerId};
use stator_processor::config::Config;
use stator_processor::pool::RouterMode;
use stator_router::hash;
use stator_testkit::http::{Answered, get, post, send, until};
use stator_testkit::model;
use stator_testkit::relay::Relay;
use stator_testkit::worker::{Attempt, Worker};

use crate::support::{self, Running, until_open};

pub(crate) const COMPLETIONS: &str = "/v1/completions";
pub(crate) const EXPLAIN: &str = "/route/explain";
/// Tokens per block of the model.
pub(crate) const BLOCK: usize = 16;

/// A processor and its workers, by name.
pub(crate) struct Stage {
    pub(crate) addr: SocketAddr,
    processor: Running,
    workers: BTreeMap<String, Played>,
}

pub(crate) struct Played {
    pub(crate) worker: Worker,
    /// Tokens of each prompt that it says it had.
    pub(crate) cached: Arc<AtomicU32>,
}

impl Stage {
    pub(crate) async fn new(mode: RouterMode) -> Self {
        Self::with(Config {
            router_mode: mode,
            ..Config::default()
        })
        .await
    }

    pub(crate) async fn with(config: Config) -> Self {
        let processor = support::start(config).await;
        Self {
            addr: processor.addr,
            processor,
            workers: BTreeMap::new(),
        }
    }

    /// Adds a worker.
    pub(crate) async fn add(&mut self, id: &str) {
        self.add_with(id, |_| {}).await;
    }

    /// Adds a worker whose card is changed.
    pub(crate) async fn add_with(&mut self, id: &str, change: impl FnOnce(&mut Card)) {
        self.add_unused(id, change).await;
        let open = self.processor_targets_after(id).await;
        until_open(self.addr, open).await;
    }

    /// Adds a worker that need not be used.
    pub(crate) async fn add_unused(&mut self, id: &str, change: impl FnOnce(&mut Card)) {
        let cached = Arc::new(AtomicU32::new(0));
        let found = Arc::clone(&cached);
        let answer = move |attempt: Attempt| {
            attempt.send(Delta {
                tokens: vec![65, model::END],
                cached_tokens: Some(found.load(Ordering::SeqCst)),
                finish: FinishReason::Stop.into(),
                ..Delta::default()
            });
        };
        let worker = Worker::customized(&self.processor.discovery, id, answer, change).await;
        self.workers
            .insert(id.to_owned(), Played { worker, cached });
    }

    /// Lets a worker leave.
    pub(crate) async fn remove(&mut self, id: &str) {
        if let Some(played) = self.workers.remove(id) {
            played.worker.stop().await;
        }
    }

    /// Waits until the processor knows a worker, and returns how many targets there are then.
    async fn processor_targets_after(&self, id: &str) -> usize {
        let known = until(self.addr, "/workers", |answered| {
            targets(&answered.json())
                .iter()
                .any(|target| target["worker"] == id)
        })
        .await;
        targets(&known.json()).len()
    }

    /// Adds a worker whose cache a relay tells of, and waits until that is known.
    pub(crate) async fn add_told(&mut self, id: &str, relay: &Relay) {
        let events = relay.events();
        self.add_with(id, |card| card.kv_events = Some(events))
            .await;
        self.until_cache(id, |cache| cache["known_from"] == "events")
            .await;
    }

    pub(crate) fn worker(&self, id: &str) -> &Played {
        &self.workers[id]
    }

    pub(crate) fn worker_mut(&mut self, id: &str) -> &mut Played {
        self.workers.get_mut(id).unwrap()
    }

    /// Waits for a state of a worker's cache, as the processor knows it.
    pub(crate) async fn until_cache(&self, id: &str, holds: impl Fn(&Value) -> bool) {
        until(self.addr, "/workers", |answered| {
            targets(&answered.json())
                .iter()
                .any(|target| target["worker"] == id && holds(&target["cache"]))
        })
        .await;
    }

    /// Asks for a completion and returns the worker that answered, as it was counted.
    pub(crate) async fn ask(&self, prompt: &str) -> String {
        self.ask_with(prompt, &[]).await
    }

    /// As [`Stage::ask`], with headers.
    pub(crate) async fn ask_with(&self, prompt: &str, headers: &[(&'static str, &str)]) -> String {
        let count = |played: &Played| played.worker.submitted();
        let before: Vec<_> = self.workers.values().map(count).collect();
        let answered = self.send(COMPLETIONS, &body(prompt), headers).await;
        assert_eq!(answered.status, 200, "{answered:?}");
        let grown = self
            .workers
            .iter()
            .zip(before)
            .find(|((_, played), before)| count(played) > *before);
        grown.unwrap().0.0.clone()
    }

    pub(crate) async fn send(
        &self,
        path: &'static str,
        body: &Value,
        headers: &[(&'static str, &str)],
    ) -> Answered {
        let mut request = post(path, body.to_string());
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        send(self.addr, request).await
    }

    pub(crate) async fn metrics(&self) -> String {
        send(self.addr, get("/metrics")).await.text().to_owned()
    }
}

pub(crate) fn body(prompt: &str) -> Value {
    json!({"model": "model", "prompt": prompt, "max_tokens": 4})
}

/// Returns a prompt of `blocks` blocks and a bit.
pub(crate) fn prompt(name: char, blocks: usize) -> String {
    let mut prompt: String = (0..blocks * BLOCK)
        .map(|at| char::from(b'a' + (at % 23) as u8))
        .collect();
    prompt.replace_range(0..1, &name.to_string());
    prompt + "?"
}

pub(crate) fn view(worker: &str) -> ViewId {
    ViewId {
        worker: WorkerId(worker.to_owned()),
        dp_rank: 0,
    }
}

/// Returns the first `blocks` blocks of a prompt.
pub(crate) fn blocks(prompt: &str, blocks: usize) -> Blocks {
    let hashes = hash::blocks(hash::root("", ""), &model::tokens(prompt), BLOCK);
    Blocks {
        medium: Medium::Gpu,
        hashes: hashes.iter().take(blocks).map(|hash| hash.0).collect(),
    }
}

pub(crate) fn stored(prompt: &str, count: usize) -> Change {
    Change::Stored(blocks(prompt, count))
}

fn targets(workers: &Value) -> Vec<Value> {
    let models = workers["models"].as_array();
    let targets = models
        .into_iter()
        .flatten()
        .flat_map(|model| model["targets"].as_array().cloned());
    targets.flatten().collect()
}
