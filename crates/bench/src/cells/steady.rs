//! Streams in their steady state: all have begun, none ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::task::JoinSet;

use super::{CONNECTIONS, ROUNDS, SHORT, median};
use crate::client::{Ask, Connection};
use crate::cpu::Cpu;
use crate::prompts::Prompts;

/// How long all streams may take to begin.
const BEGIN: Duration = Duration::from_secs(20);

/// What streams cost.
#[derive(Debug)]
pub(super) struct Steady {
    /// Microseconds of CPU per event, for each group of processes.
    pub(super) each: Vec<f64>,
    /// Events per second of all streams.
    pub(super) rate: f64,
}

/// Opens the streams, lets them begin, and measures for `window`; then breaks them off.
///
/// The answers are long enough to outlast it at one token per `step`. An event is a token as long as the
/// client keeps up; if deltas ever share one, the cost of a token is overstated.
pub(super) async fn measure(
    address: &str,
    pids: &[Vec<u32>],
    window: Duration,
    step: Duration,
) -> anyhow::Result<Steady> {
    let tokens = (window * 2 + BEGIN).div_duration_f64(step) as usize + 100;
    let events = Arc::new(AtomicUsize::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let mut streams = JoinSet::new();
    for index in 0..CONNECTIONS {
        let (events, begun) = (events.clone(), begun.clone());
        let mut connection = Connection::open(address).await?;
        let ask = Ask::completion(&Prompts::new(index as u64).text(SHORT), tokens);
        streams.spawn(async move {
            let mut first = true;
            let seen = |count| {
                begun.fetch_add(usize::from(std::mem::take(&mut first)), Ordering::Relaxed);
                events.fetch_add(count, Ordering::Relaxed);
            };
            connection.watch(&ask, seen).await
        });
    }
    let deadline = Instant::now() + BEGIN;
    while begun.load(Ordering::Relaxed) < CONNECTIONS {
        if Instant::now() > deadline {
            bail!("not all streams began in {BEGIN:?}");
        }
        check(&mut streams)?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let read = || -> anyhow::Result<(Instant, usize, Vec<Cpu>)> {
        let used = pids.iter().map(|pids| Cpu::of_all(pids));
        Ok((
            Instant::now(),
            events.load(Ordering::Relaxed),
            used.collect::<Result<_, _>>()?,
        ))
    };
    let mut each: Vec<Vec<f64>> = vec![Vec::new(); pids.len()];
    let mut rates = Vec::new();
    let mut before = read()?;
    for _ in 0..ROUNDS {
        tokio::time::sleep(window / ROUNDS).await;
        check(&mut streams)?;
        let now = read()?;
        let count = now.1 - before.1;
        for (group, values) in each.iter_mut().enumerate() {
            values.push(now.2[group].since(before.2[group]).micros_each(count));
        }
        rates.push(count as f64 / (now.0 - before.0).as_secs_f64());
        before = now;
    }
    Ok(Steady {
        each: each.into_iter().map(median).collect(),
        rate: median(rates),
    })
}

/// An error if a stream has ended.
fn check(streams: &mut JoinSet<anyhow::Result<crate::client::Answer>>) -> anyhow::Result<()> {
    match streams.try_join_next() {
        None => Ok(()),
        Some(ended) => {
            ended.context("a stream")?.context("a stream")?;
            bail!("a stream ended too early");
        }
    }
}
