//! Keeps one view: hears its engine, tells what changes, answers who asks.

use std::{sync::Arc, time::Duration};

use prost::Message;
use stator_common::{events::ViewId, events::plane::Asker, proto::kv};
use stator_engine::kv_events::{Endpoints, Heard, Source, SourceError};
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tracing::{debug, info, warn};

use crate::{
    hub::Outgoing,
    metrics,
    mirror::{Mirror, Notice, Pending},
};

/// How long a change waits for others to leave with.
const GATHER: Duration = Duration::from_millis(5);

/// How often something is said, at least. Followers take a relay for gone after several of these.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long an engine may say nothing before it is asked whether something was missed: what is dropped last is
/// shown by nothing else.
const QUIET: Duration = Duration::from_secs(2);

/// How long an answer may pause. An engine answers between two batches, at the latest after 100 ms.
const ANSWER: Duration = Duration::from_secs(5);

/// The wait before an engine that cannot be heard is tried again.
const AGAIN: Duration = Duration::from_millis(250);

/// A question for all of a view.
pub(crate) struct Ask {
    pub(crate) asker: Asker,
    pub(crate) number: u64,
}

/// Keeps one view.
pub(crate) struct Keeper {
    view: ViewId,
    topic: Arc<str>,
    endpoints: Endpoints,
    mirror: Mirror,
    out: mpsc::Sender<Outgoing>,
    asks: mpsc::Receiver<Ask>,
    share: metrics::Share,
    orphans: u64,
}

/// Nobody takes what is told.
struct Closed;

/// When what is due.
struct Due {
    flush: Option<Instant>,
    heartbeat: Instant,
    /// An answer that does not come, or a check.
    engine: Instant,
}

impl Keeper {
    pub(crate) fn new(
        view: ViewId,
        endpoints: Endpoints,
        out: mpsc::Sender<Outgoing>,
        asks: mpsc::Receiver<Ask>,
    ) -> Self {
        Self {
            topic: view.topic().into(),
            mirror: Mirror::new(view.clone(), rand::random),
            view,
            endpoints,
            out,
            asks,
            share: metrics::Share::new(),
            orphans: 0,
        }
    }

    /// Keeps the view until nobody takes what is told.
    pub(crate) async fn run(mut self) {
        while let Ok(source) = self.connect().await {
            let Ok(why) = self.hear(source).await else {
                return;
            };
            info!(view = %self.view, %why, "engine lost; listening for it again");
        }
    }

    /// Connects to the engine, however long it takes.
    async fn connect(&mut self) -> Result<Source, Closed> {
        let endpoints = self.endpoints.clone();
        let connect = async {
            loop {
                match Source::connect(&endpoints).await {
                    Ok(source) => return source,
                    Err(why) => debug!(%why, "no engine yet"),
                }
                time::sleep(AGAIN).await;
            }
        };
        tokio::pin!(connect);
        loop {
            tokio::select! {
                source = &mut connect => return Ok(source),
                ask = self.asks.recv() => self.answer(ask.ok_or(Closed)?).await?,
            }
        }
    }

    /// Hears the engine until it is lost, and returns why.
    async fn hear(&mut self, mut source: Source) -> Result<SourceError, Closed> {
        let lost = || SourceError::Lost {
            endpoint: self.endpoints.events.clone(),
        };
        let silent = lost();
        let mut ask = self.mirror.connected(source.repairs());
        info!(view = %self.view, from = self.endpoints.events, "listens");
        let now = Instant::now();
        let mut due = Due {
            flush: None,
            heartbeat: now,
            engine: now + ANSWER,
        };
        loop {
            if let Some(from) = ask.take()
                && let Err(why) = source.ask(from).await
            {
                return Ok(why);
            }
            match self.mirror.pending() {
                Pending::Nothing => due.flush = None,
                Pending::Some => due.flush = due.flush.or_else(|| Some(Instant::now() + GATHER)),
                Pending::Full => self.tell().await?,
            }
            let next = due.heartbeat.min(due.engine);
            let next = due.flush.map_or(next, |flush| flush.min(next));
            tokio::select! {
                heard = source.hear() => match heard {
                    Ok(heard) => {
                        // What is published says nothing of an answer that does not come.
                        let beside = self.mirror.is_asking() && matches!(heard, Heard::Live(_));
                        ask = self.mirror.heard(heard);
                        self.count();
                        let wait = if self.mirror.is_asking() { ANSWER } else { QUIET };
                        if !beside {
                            due.engine = Instant::now() + wait;
                        }
                    }
                    Err(why) => return Ok(why),
                },
                question = self.asks.recv() => {
                    self.answer(question.ok_or(Closed)?).await?;
                }
                () = time::sleep_until(next) => {
                    let now = Instant::now();
                    if due.flush.is_some_and(|at| at <= now) {
                        self.tell().await?;
                    }
                    if due.heartbeat <= now {
                        due.heartbeat = now + HEARTBEAT;
                        self.beat().await?;
                    }
                    if due.engine <= now {
                        if self.mirror.is_asking() {
                            return Ok(silent);
                        }
                        ask = self.mirror.check();
                        due.engine = now + ANSWER;
                    }
                }
            }
        }
    }

    fn count(&mut self) {
        for notice in self.mirror.notices() {
            metrics::notice(notice);
            let view = &self.view;
            match notice {
                Notice::Gap => debug!(%view, "missed something, asking for it"),
                Notice::Restarted => info!(%view, "another engine: its cache is looked at anew"),
                Notice::Forgotten => warn!(
                    %view,
                    "the engine forgot what was missed: only what it stores from there on is known"
                ),
                Notice::Unreadable => warn!(%view, "what was known is dropped"),
            }
        }
        let orphans = self.mirror.view().orphans();
        // Another life begins from 0.
        metrics::orphans(orphans.checked_sub(self.orphans).unwrap_or(orphans));
        self.orphans = orphans;
        self.share.set(self.mirror.view().len());
    }

    async fn tell(&mut self) -> Result<(), Closed> {
        let batches = self.mirror.flush();
        metrics::published(batches.len());
        for batch in batches {
            self.publish(&batch).await?;
        }
        Ok(())
    }

    async fn beat(&mut self) -> Result<(), Closed> {
        self.tell().await?;
        match self.mirror.is_synced() {
            true => self.publish(&self.mirror.heartbeat()).await,
            false => Ok(()),
        }
    }

    async fn publish(&self, batch: &kv::Batch) -> Result<(), Closed> {
        self.send(Outgoing::News {
            topic: self.topic.clone(),
            news: batch.encode_to_vec().into(),
        })
        .await
    }

    async fn answer(&mut self, ask: Ask) -> Result<(), Closed> {
        if !self.mirror.is_synced() {
            let part = unknown(&self.view.worker.0, self.view.dp_rank, ask.number);
            return self.send(Outgoing::answer(&ask.asker, &part)).await;
        }
        self.tell().await?;
        metrics::snapshot();
        for part in self.mirror.snapshot(ask.number) {
            self.send(Outgoing::answer(&ask.asker, &part)).await?;
        }
        Ok(())
    }

    async fn send(&self, outgoing: Outgoing) -> Result<(), Closed> {
        self.out.send(outgoing).await.map_err(|_| Closed)
    }
}

/// Returns the answer of a relay that does not know a view, or not yet.
pub(crate) fn unknown(worker: &str, dp_rank: u32, number: u64) -> kv::SnapshotPart {
    kv::SnapshotPart {
        worker: worker.to_owned(),
        dp_rank,
        number,
        unknown: true,
        ..kv::SnapshotPart::default()
    }
}
