//! Requests one after the other on every connection.

use std::time::{Duration, Instant};

use futures::future::try_join_all;

use super::{CONNECTIONS, SHORT};
use crate::client::{Ask, Connection};
use crate::cpu::Cpu;
use crate::prompts::Prompts;
use crate::topology::Topology;

/// What was answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) requests: usize,
    pub(super) events: usize,
}

/// Keeps all connections busy for a time, each with one request at least, every prompt a new one.
pub(super) async fn run(address: &str, tokens: usize, window: Duration) -> anyhow::Result<Done> {
    let end = Instant::now() + window;
    let connections = (0..CONNECTIONS).map(|_| async move {
        let mut prompts = Prompts::new(rand::random());
        let mut connection = Connection::open(address).await?;
        let (mut requests, mut events) = (0, 0);
        while requests == 0 || Instant::now() < end {
            let ask = Ask::completion(&prompts.text(SHORT), tokens);
            events += connection.ask(&ask).await?.events;
            requests += 1;
        }
        anyhow::Ok((requests, events))
    });
    let all = try_join_all(connections).await?;
    let (requests, events) = all
        .into_iter()
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Ok(Done { requests, events })
}

/// What a load brought and cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    pub(super) requests: usize,
    pub(super) events: usize,
    pub(super) took: Duration,
    pub(super) processor: Cpu,
    pub(super) worker: Cpu,
}

impl Round {
    /// Runs the load once.
    pub(super) async fn take(
        topology: &Topology,
        tokens: usize,
        window: Duration,
    ) -> anyhow::Result<Self> {
        let processor = Cpu::of_all(&topology.processor())?;
        let worker = Cpu::of_all(&topology.workers())?;
        let start = Instant::now();
        let Done { requests, events } = run(&topology.address, tokens, window).await?;
        Ok(Self {
            requests,
            events,
            took: start.elapsed(),
            processor: Cpu::of_all(&topology.processor())?.since(processor),
            worker: Cpu::of_all(&topology.workers())?.since(worker),
        })
    }
}
