//! A simulated engine from handshake to end.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::info;
use zeromq::{SocketRecv, SocketSend, ZmqMessage};

use crate::config::Config;
use crate::engine::{Engine, Input};
use crate::link::{self, Link};
use crate::publisher::{Publisher, PublisherError};
use crate::transfer::Side;
use crate::wire::ready;

/// How long the last words may take to leave the process; the sockets do not say when they have.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How an engine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was told to.
    Stopped,
    /// It said that it was dead, for this reason.
    Dead(String),
    /// Without a word.
    Vanished,
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    #[error(
        "to serve one request of {max_model_len} tokens, {needed} blocks are needed, {blocks} are \
         there"
    )]
    TooFewBlocks {
        max_model_len: usize,
        needed: usize,
        blocks: usize,
    },
    #[error("told to fail while loading")]
    Load,
    #[error("handshake: {0}")]
    Handshake(#[from] zeromq::ZmqError),
    #[error("the frontend's answer to HELLO: {0}")]
    Init(String),
    #[error(transparent)]
    Publisher(#[from] PublisherError),
    #[error("bind the KV connector's side channel: {0}")]
    Side(std::io::Error),
}

/// Starts engines.
#[derive(Debug)]
pub struct Sim;

/// A running engine. Dropping it ends the engine without a word; await it for how it ended.
#[derive(Debug)]
pub struct Handle {
    task: JoinHandle<Result<Exit, SimError>>,
    stop: CancellationToken,
}

impl Handle {
    /// Asks the engine to abort what runs and to end, as SIGTERM does.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Ends the engine without a word, as SIGKILL does.
    pub fn kill(&self) {
        self.task.abort();
    }
}

impl Future for Handle {
    type Output = Result<Exit, SimError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.task)
            .poll(context)
            .map(|joined| joined.unwrap_or(Ok(Exit::Vanished)))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Sim {
    /// Starts an engine as a task of this runtime: it dials its frontend, and serves it.
    #[must_use]
    pub fn spawn(config: Config) -> Handle {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(config, stop.clone()));
        Handle { task, stop }
    }
}

async fn run(mut config: Config, stop: CancellationToken) -> Result<Exit, SimError> {
    let limits = &config.limits;
    let needed = limits.max_model_len.div_ceil(limits.block_size) + 1;
    if limits.num_blocks < needed {
        return Err(SimError::TooFewBlocks {
            max_model_len: limits.max_model_len,
            needed,
            blocks: limits.num_blocks,
        });
    }
    let identity = (config.dp_rank as u16).to_le_bytes();
    let mut handshake = link::dealer(identity);
    let greeted = async {
        link::connect(&mut handshake, &config.handshake).await;
        handshake
            .send(ZmqMessage::from(ready::greeting("HELLO")))
            .await?;
        handshake.recv().await
    };
    let init = tokio::select! {
        init = greeted => init?.into_vec(),
        () = stop.cancelled() => return Ok(Exit::Stopped),
    };
    let init = init.last().map_or(&[][..], AsRef::as_ref);
    let addresses = ready::decode_init(init)
        .map_err(|error| SimError::Init(error.to_string()))?
        .ok_or_else(|| SimError::Init("no addresses".into()))?;
    tokio::time::sleep(config.timing.load).await;
    if config.faults.fail_to_load {
        return Err(SimError::Load);
    }

    let (to_engine, inputs) = mpsc::unbounded_channel();
    let mut publisher = None;
    if let Some(events) = &mut config.kv_events {
        publisher = Some(Publisher::bind(events, config.dp_rank).await?);
    }
    let mut side = None;
    if let Some(connector) = &config.connector {
        let to_engine = to_engine.clone();
        let released = move |id| {
            let _ = to_engine.send(Input::Released(id));
        };
        side = Some(
            Side::bind(connector.clone(), released)
                .await
                .map_err(SimError::Side)?,
        );
    }

    let instance = format!("sim-{:016x}", rand::random::<u64>());
    let hello = Bytes::from(ready::ready_response(&config, &instance));
    // Dropped, and its tasks ended, with this future.
    let mut links = JoinSet::new();
    let mut outputs = Vec::new();
    for (input, output) in addresses.inputs.into_iter().zip(addresses.outputs) {
        let (sender, queue) = mpsc::unbounded_channel();
        outputs.push(sender);
        let to_engine = to_engine.clone();
        let link = Link {
            input,
            output,
            identity,
        };
        links.spawn(link.run(hello.clone(), queue, move |frames| {
            let _ = to_engine.send(Input::Message(frames));
        }));
    }
    handshake
        .send(ZmqMessage::from(ready::greeting("READY")))
        .await?;
    info!(rank = config.dp_rank, "ready");
    let engine = Engine::new(config, inputs, to_engine, outputs, publisher, side);
    let exit = engine.run(stop).await;
    if exit != Exit::Vanished {
        // The engine is gone and with it the senders; what is queued still leaves.
        let _ = tokio::time::timeout(LAST_WORDS, async {
            while links.join_next().await.is_some() {}
        })
        .await;
        tokio::time::sleep(LAST_WORDS / 4).await;
    }
    drop(handshake);
    Ok(exit)
}
