//! The one task between the engine's outputs and the sink: receive, walk, hand over.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use crate::{
    grammar_log,
    live::Live,
    lockstep::Rank,
    output::{Finish, Message, Output, RequestError, RequestKey},
    sink::{Step, StepSink},
    sockets::Outputs,
    utilities::Utilities,
    wire::Codec,
};

/// What the supervisor tells the receive task.
pub(crate) enum Control {
    /// The connection broke and came back: outputs may be lost, so what ran is failed.
    Broken,
    /// The engine is gone. What has arrived is still handed over, then every live request is failed.
    End {
        message: String,
        /// Answered when the sockets are closed.
        done: oneshot::Sender<()>,
    },
}

/// Messages heard from the engine, for whoever wonders whether it lives.
#[derive(Debug, Default)]
pub(crate) struct Heard(AtomicU64);

impl Heard {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What others share with the receive task.
pub(crate) struct Shared {
    pub(crate) codec: Arc<Codec>,
    pub(crate) live: Live,
    pub(crate) utilities: Utilities,
    pub(crate) heard: Heard,
    /// The engine's place among ranks that step together.
    pub(crate) lockstep: Option<Rank>,
}

/// The receive task.
pub(crate) struct Receiver<S> {
    pub(crate) outputs: Outputs,
    pub(crate) shared: Arc<Shared>,
    pub(crate) control: mpsc::Receiver<Control>,
    /// Told when the engine says that it is dead.
    pub(crate) obituary: mpsc::Sender<()>,
    /// The engine's log, which alone says that a grammar was at fault.
    pub(crate) log: PathBuf,
    pub(crate) sink: S,
}

impl<S: StepSink> Receiver<S> {
    /// Runs until it is told to end.
    pub(crate) async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                message = self.outputs.recv() => match message {
                    Ok(frames) => self.message(&frames),
                    // One peer's stream broke; the socket goes on.
                    Err(error) => warn!(%error, "outputs of a connection cannot be read"),
                },
                control = self.control.recv() => match control {
                    Some(Control::Broken) => self.fail_all("connection_lost", "the connection to the engine broke"),
                    Some(Control::End { message, done }) => {
                        self.end(&message).await;
                        let _ = done.send(());
                        return;
                    }
                    // The runtime is going down.
                    None => return,
                },
            }
        }
    }

    fn message(&mut self, frames: &[Bytes]) {
        self.shared.heard.0.fetch_add(1, Ordering::Relaxed);
        let mut live = self.shared.live.lock();
        let mut batch = match self
            .shared
            .codec
            .decode_outputs(frames, |id| live.key_of(id))
        {
            Ok(Message::Batch(batch)) => batch,
            Ok(Message::Dead) => {
                let _ = self.obituary.try_send(());
                return;
            }
            Err(error) => {
                drop(live);
                warn!(%error, "an engine message cannot be read");
                // Whose tokens it held is not known, and a stream with a hole is worse than none.
                self.fail_all(
                    "unreadable_output",
                    "an output of the engine could not be read",
                );
                return;
            }
        };
        let ended = batch
            .outputs
            .iter_mut()
            .filter(|output| output.finish.is_some());
        let mut unexplained = Vec::new();
        for output in ended {
            let id = live.finished(output.key);
            if let (Some(Finish::Error), None, Some(id)) = (output.finish, &output.error, id) {
                unexplained.push((output, id));
            }
        }
        for orphan in &batch.orphans {
            if live.orphan(orphan) {
                debug!(id = %String::from_utf8_lossy(orphan), "aborted a request of an earlier worker");
            }
        }
        drop(live);
        for (output, id) in unexplained {
            output.error =
                grammar_log::blames(&self.log, &id).then(|| Box::new(RequestError::grammar()));
        }
        if let Some(output) = batch.utility {
            self.shared.utilities.answered(output);
        }
        if !batch.outputs.is_empty() || batch.stats.is_some() {
            self.sink.step(Step {
                outputs: batch.outputs,
                stats: batch.stats,
            });
        }
    }

    async fn end(&mut self, message: &str) {
        while let Some(Ok(frames)) = self.outputs.recv().now_or_never() {
            self.message(&frames);
        }
        self.fail_all("engine_dead", message);
        self.shared.live.lock().close();
        self.shared.utilities.close();
        self.outputs.close().await;
    }

    /// Ends every live request with an error, each exactly once.
    fn fail_all(&mut self, code: &str, message: &str) {
        let keys = self.shared.live.lock().take_all();
        if keys.is_empty() {
            return;
        }
        let error = RequestError {
            code: code.to_owned(),
            message: message.to_owned(),
            retryable: true,
        };
        let outputs = keys.into_iter().map(|key| failed(key, &error)).collect();
        self.sink.step(Step {
            outputs,
            stats: None,
        });
    }
}

fn failed(key: RequestKey, error: &RequestError) -> Output {
    Output {
        key,
        tokens: Default::default(),
        logprobs: None,
        prompt_logprobs: None,
        finish: Some(Finish::Error),
        stop_token: None,
        cached_tokens: None,
        kv_transfer_params: None,
        error: Some(Box::new(error.clone())),
    }
}
