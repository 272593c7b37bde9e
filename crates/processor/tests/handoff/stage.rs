//! A processor with prefill and decode workers that the test plays.

use std::net::SocketAddr;

use bytes::Bytes;
use serde_json::{Value, json};
use stator_common::Code;
use stator_common::card::{HandOff, HandOffProtocol, Role};
use stator_common::plane::delta::failed;
use stator_common::proto::worker::{Delta, FinishReason};
use stator_processor::config::Config;
use stator_testkit::http::{Answered, post, send};
use stator_testkit::worker::{Attempt, Script, Worker};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;

use crate::support::{self, Running, until_open};

pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// A processor, and the workers that the test adds.
pub(crate) struct Stage {
    pub(crate) addr: SocketAddr,
    processor: Running,
    open: usize,
}

/// A worker that the test plays.
pub(crate) struct Played {
    attempts: UnboundedReceiver<Attempt>,
    cancels: UnboundedReceiver<u32>,
    pub(crate) worker: Worker,
}

struct ToTheTest {
    attempts: UnboundedSender<Attempt>,
    cancels: UnboundedSender<u32>,
}

impl Script for ToTheTest {
    fn submitted(&self, attempt: Attempt) {
        drop(self.attempts.send(attempt));
    }

    fn cancelled(&self, stream: u32) {
        self.cancels.send(stream).ok();
    }
}

impl Stage {
    pub(crate) async fn new(config: Config) -> Self {
        let processor = support::start(config).await;
        Self {
            addr: processor.addr,
            processor,
            open: 0,
        }
    }

    /// Starts a stage with one worker of each role.
    pub(crate) async fn with_both(config: Config) -> (Self, Played, Played) {
        let mut stage = Self::new(config).await;
        let prefill = stage.add("p0", Role::Prefill).await;
        let decode = stage.add("d0", Role::Decode).await;
        (stage, prefill, decode)
    }

    pub(crate) async fn add(&mut self, id: &str, role: Role) -> Played {
        self.add_with(id, role, |_| {}).await
    }

    pub(crate) async fn add_with(
        &mut self,
        id: &str,
        role: Role,
        change: impl FnOnce(&mut stator_common::Card),
    ) -> Played {
        self.add_ranks(id, role, 1, change).await
    }

    /// Adds a worker that `change` gives so many ranks.
    pub(crate) async fn add_ranks(
        &mut self,
        id: &str,
        role: Role,
        ranks: usize,
        change: impl FnOnce(&mut stator_common::Card),
    ) -> Played {
        let (attempts_to, attempts) = mpsc::unbounded_channel();
        let (cancels_to, cancels) = mpsc::unbounded_channel();
        let script = ToTheTest {
            attempts: attempts_to,
            cancels: cancels_to,
        };
        let worker = Worker::customized(&self.processor.discovery, id, script, |card| {
            card.role = role;
            card.handoff = Some(HandOff {
                connector: "NixlConnector".to_owned(),
                protocol: HandOffProtocol::ResponseCarried,
                tensor_parallel_size: 1,
                lease_ms: 30_000,
                peers: Vec::new(),
            });
            change(card);
        })
        .await;
        self.open += ranks;
        until_open(self.addr, self.open).await;
        Played {
            attempts,
            cancels,
            worker,
        }
    }

    /// Asks for a completion while the test plays the workers.
    pub(crate) fn ask(&self, body: &Value) -> JoinHandle<Answered> {
        tokio::spawn(send(self.addr, post(COMPLETIONS, body.to_string())))
    }

    /// Asks for three tokens.
    pub(crate) fn ask_shortly(&self) -> JoinHandle<Answered> {
        self.ask(&json!({"prompt": "abc", "max_tokens": 3}))
    }

    /// Returns a metric of the processor.
    pub(crate) async fn handoffs(&self, outcome: &str) -> u64 {
        let answered = send(self.addr, stator_testkit::http::get("/metrics")).await;
        let sample = format!("outcome=\"{outcome}\"}} ");
        let text = answered.text();
        let lines = text
            .lines()
            .filter(|line| line.starts_with("stator_processor_handoffs_total"));
        let value = lines.filter_map(|line| line.split_once(&sample)).next();
        value.map_or(0, |(_, value)| value.parse().expect("a number"))
    }
}

impl Played {
    /// Waits for the next request.
    pub(crate) async fn attempt(&mut self) -> Attempt {
        self.attempts.recv().await.expect("the worker lives")
    }

    /// Says whether a request waits.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.attempts.is_empty()
    }

    /// Waits until a request is given up.
    pub(crate) async fn cancelled(&mut self) -> u32 {
        self.cancels.recv().await.expect("the worker lives")
    }

    /// Answers the next request as a prefill worker does, with `params`; returns what was asked.
    pub(crate) async fn hand_on(&mut self, params: &'static str) -> Attempt {
        let attempt = self.attempt().await;
        attempt.send(handed(params));
        attempt
    }
}

/// The answer of a prefill worker.
pub(crate) fn handed(params: &'static str) -> Delta {
    Delta {
        tokens: vec![u32::from(b'x')],
        finish: FinishReason::Length.into(),
        cached_tokens: Some(2),
        kv_transfer_params: Bytes::from_static(params.as_bytes()),
        kv_lease_ms: Some(30_000),
        ..Delta::default()
    }
}

/// The answer of a worker that refuses a request before its engine has seen it.
pub(crate) fn refused(code: Code) -> Delta {
    let mut delta = failed(0, code, "not now");
    if let Some(error) = &mut delta.error {
        error.untouched = true;
    }
    delta
}

/// Answers with a text that is cut off.
pub(crate) fn answer(attempt: &Attempt, text: &str) {
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    attempt.finish(&tokens, FinishReason::Length);
}
