//! The task that keeps a queue's part of the line at NATS: it opens the line while all prefill workers take from it,
//! puts tickets in, and answers workers.
//!
//! The line is used only while every prefill worker that is connected takes from it: else those that do not would have
//! nothing to do, and nobody would notice. Whatever goes wrong closes it, with a warning, and it is tried again.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use stator_common::WorkerId;
use stator_common::nats::Nats;
use stator_common::plane::Address;
use stator_common::tickets::desk::{Desk, Heard, INVITE_EVERY};
use stator_common::tickets::line::Line;
use stator_common::tickets::{Invitation, LineError, LineName};
use tokio::sync::mpsc;
use tokio::time::{self, Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use super::Queue;
use super::tickets::Put;
use crate::pool::Availability;

/// How long a worker may leave invitations unanswered.
const UNANSWERED: Duration = INVITE_EVERY.saturating_mul(4);

/// How often it is looked whether the line is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What becomes of the line, for one queue.
pub(in crate::fleet) struct Clerk {
    queue: Arc<Queue>,
    nats: Nats,
    name: LineName,
    workers: HashMap<WorkerId, Known>,
    /// Why the line is closed, if that was said.
    complaint: Option<String>,
}

/// What is known of a prefill worker.
struct Known {
    since: Instant,
    /// When it last said that it takes from the line.
    pulls: Option<Instant>,
}

/// Whether workers take from the line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    All,
    /// Some were asked a moment ago.
    Unknown,
    /// These do not.
    Not(Vec<String>),
}

impl Clerk {
    pub(in crate::fleet) fn new(queue: Arc<Queue>, nats: Nats, name: LineName) -> Self {
        Self {
            queue,
            nats,
            name,
            workers: HashMap::new(),
            complaint: None,
        }
    }

    /// Runs until it is dropped.
    pub(in crate::fleet) async fn run(mut self) {
        loop {
            if self.places().is_empty() {
                // Nobody is reached by NATS, which need not be there.
                time::sleep(INVITE_EVERY).await;
                continue;
            }
            let Err(error) = self.serve().await;
            self.close(error.to_string());
            time::sleep(INVITE_EVERY).await;
        }
    }

    /// Serves the line until something is wrong with it.
    async fn serve(&mut self) -> Result<Infallible, LineError> {
        let line = Arc::new(Line::open(&self.nats, &self.name).await?);
        let mut desk = Desk::open(&self.nats).await?;
        let life = line.life().clone();
        let (clerk, mut puts) = mpsc::unbounded_channel();
        let mut invite = time::interval(INVITE_EVERY);
        invite.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = look(Arc::clone(&line));
        let mut last = self.queue.last_ticket();
        self.workers.clear();
        loop {
            tokio::select! {
                () = life.cancelled() => return Err(lost(&self.name)),
                heard = desk.next() => match heard.ok_or_else(|| lost(&self.name))? {
                    Heard::Pulls(worker) => {
                        if let Some(known) = self.workers.get_mut(&worker) {
                            known.pulls = Some(Instant::now());
                        }
                        self.judge(&clerk);
                    }
                    Heard::Offers(offer, reply) => desk.answer(reply, &self.queue.answer(&offer)).await,
                },
                Some(put) = puts.recv() => self.put(&line, &desk, put).await?,
                Some(tickets) = looks.recv() => {
                    // What was put in a while ago is there until it is taken, and then nobody waits by it.
                    if tickets? == 0 && self.queue.waits_since(last) {
                        return Err(lost(&self.name));
                    }
                    last = self.queue.last_ticket();
                }
                _ = invite.tick() => {
                    let invitation = Invitation { line: self.name.clone() };
                    for (_, place) in self.places() {
                        desk.invite(&place, &invitation).await?;
                    }
                    self.judge(&clerk);
                }
            }
        }
    }

    /// Puts a ticket into the line.
    async fn put(&self, line: &Line, desk: &Desk, put: Put) -> Result<(), LineError> {
        let Put { number, first } = put;
        let ticket = desk.ticket(number);
        let only = first.as_ref().map(|(worker, _)| worker);
        let is_there = line.put(only, &ticket).await?;
        let queue = Arc::clone(&self.queue);
        let again = first.map(|(_, kept)| kept);
        tokio::spawn(async move {
            if let Err(error) = is_there.await {
                debug!(%error, "a ticket is not in line");
                return queue.leave_line(number);
            }
            if let Some(kept) = again {
                time::sleep(kept).await;
                queue.let_anybody(number);
            }
        });
        Ok(())
    }

    /// Opens or closes the line, as workers take from it.
    fn judge(&mut self, clerk: &mpsc::UnboundedSender<Put>) {
        self.meet();
        match self.verdict(Instant::now()) {
            Verdict::All => {
                if !self.queue.is_shared() {
                    self.complaint = None;
                    info!(line = self.name.stream, "prompts wait in a line that processors share");
                    self.queue.open_line(clerk.clone());
                }
            }
            Verdict::Unknown => {}
            Verdict::Not(workers) => self.close(format!(
                "prefill workers do not take from it: {}; they need --request-plane nats, a login that may use JetStream, and the same --namespace",
                workers.join(", ")
            )),
        }
    }

    /// Notes which workers are there.
    fn meet(&mut self) {
        let targets = self.queue.prefill.targets();
        let connected = targets
            .iter()
            .filter(|target| target.availability() != Availability::Absent);
        let connected: Vec<_> = connected.map(|target| target.worker.id()).collect();
        self.workers.retain(|known, _| connected.contains(&known));
        for id in connected {
            self.workers.entry(id.clone()).or_insert_with(|| Known {
                since: Instant::now(),
                pulls: None,
            });
        }
    }

    fn verdict(&self, now: Instant) -> Verdict {
        let is_late = |known: &&Known| {
            let last = known.pulls.unwrap_or(known.since);
            now.duration_since(last) > UNANSWERED
        };
        let workers = || self.workers.iter();
        let late = workers().filter(|(_, known)| is_late(known));
        let mut late: Vec<String> = late.map(|(id, _)| id.to_string()).collect();
        late.sort();
        if !late.is_empty() {
            Verdict::Not(late)
        } else if workers().any(|(_, known)| known.pulls.is_none()) || self.workers.is_empty() {
            Verdict::Unknown
        } else {
            Verdict::All
        }
    }

    fn close(&mut self, reason: String) {
        self.queue.close_line();
        if self.complaint.as_ref() != Some(&reason) {
            warn!(
                line = self.name.stream,
                "prompts wait in a queue of this processor, not in the line: {reason}"
            );
            self.complaint = Some(reason);
        }
    }

    /// Returns the prefill workers that are reached over NATS, and where.
    fn places(&self) -> Vec<(WorkerId, String)> {
        let targets = self.queue.prefill.targets();
        let mut places: Vec<(WorkerId, String)> = targets
            .iter()
            .filter_map(|target| {
                let card = target.worker.card();
                match card.address.parse() {
                    Ok(Address::Nats(place)) => Some((card.worker.clone(), place)),
                    _ => None,
                }
            })
            .collect();
        places.dedup();
        places
    }
}

/// Looks every now and then how many tickets are in a line, while anybody wants to know.
fn look(line: Arc<Line>) -> mpsc::Receiver<Result<u64, LineError>> {
    let (seen, looks) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            time::sleep(LOOK_EVERY).await;
            if seen.send(line.tickets().await).await.is_err() {
                return;
            }
        }
    });
    looks
}

fn lost(name: &LineName) -> LineError {
    LineError::Lost(name.stream.clone())
}
