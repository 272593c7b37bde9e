//! A processor with one worker, which the test plays itself.

use std::net::SocketAddr;

use serde_json::Value;
use stator_common::card;
use stator_common::proto::worker::TokenLogprobs;
use stator_processor::config::Config;
use stator_testkit::http::{Answered, Reading, open, post, send};
use stator_testkit::worker::{Attempt, Script, Worker};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;

use crate::support::{self, Running, until_open};

pub(crate) struct Stage {
    pub(crate) addr: SocketAddr,
    attempts: UnboundedReceiver<Attempt>,
    cancels: UnboundedReceiver<u32>,
    _processor: Running,
    _worker: Worker,
}

/// Hands everything to the test.
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
    pub(crate) async fn new() -> Self {
        Self::customized(Config::default(), |_| {}).await
    }

    pub(crate) async fn customized(config: Config, change: impl FnOnce(&mut card::Model)) -> Self {
        let processor = support::start(config).await;
        let (attempts_to, attempts) = mpsc::unbounded_channel();
        let (cancels_to, cancels) = mpsc::unbounded_channel();
        let script = ToTheTest {
            attempts: attempts_to,
            cancels: cancels_to,
        };
        let change = |card: &mut card::Card| change(&mut card.model);
        let worker = Worker::customized(&processor.discovery, "scripted", script, change).await;
        until_open(processor.addr, 1).await;
        Self {
            addr: processor.addr,
            attempts,
            cancels,
            _processor: processor,
            _worker: worker,
        }
    }

    /// Sends a request while the test plays the worker.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> JoinHandle<Answered> {
        tokio::spawn(send(self.addr, post(path, body.to_string())))
    }

    /// Waits for the next request at the worker.
    pub(crate) async fn attempt(&mut self) -> Attempt {
        self.attempts
            .recv()
            .await
            .expect("the worker lives as long as the stage")
    }

    /// Waits until the worker is told to cancel, and returns the stream.
    pub(crate) async fn cancelled(&mut self) -> u32 {
        self.cancels
            .recv()
            .await
            .expect("the worker lives as long as the stage")
    }

    /// Sends a request, and says something at the worker; returns both ends, with the answer begun.
    pub(crate) async fn begin(
        &mut self,
        path: &str,
        body: &Value,
        said: &str,
    ) -> (Reading, Attempt) {
        tokio::join!(open(self.addr, path, body), async {
            let attempt = self.attempt().await;
            attempt.say(said);
            attempt
        })
    }

    /// Sends a request that must be refused before it reaches the worker; returns status and error.
    pub(crate) async fn refused(&mut self, path: &str, body: &str) -> (u16, Value) {
        let answered = send(self.addr, post(path, body.to_owned())).await;
        assert!(
            self.attempts.try_recv().is_err(),
            "{body} reached the worker"
        );
        answered.error();
        (answered.status, answered.json()["error"].clone())
    }
}

/// Returns a position with these candidates; the chosen token is first.
pub(crate) fn position(candidates: &[(char, f32)], rank: u32) -> TokenLogprobs {
    TokenLogprobs {
        tokens: candidates.iter().map(|(token, _)| *token as u32).collect(),
        logprobs: candidates.iter().map(|(_, logprob)| *logprob).collect(),
        rank,
    }
}
