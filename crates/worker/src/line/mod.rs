//! A prefill worker that is reached over NATS takes prompts from the line that processors share, when it has room.
//!
//! It knows of the line by being invited, so nothing is configured here; see [`tickets`](stator_common::tickets) for how
//! that goes. Room is what processors with a queue of their own call room (`router::backlog`), but of what really runs
//! here, whoever sent it. Tickets are seen to one after the other: each answer changes what room there is.

mod promises;

use std::{collections::HashMap, time::Duration};

use stator_common::{
    WorkerId,
    nats::Nats,
    plane::Address,
    tickets::{
        Answer, Invitation, LineError, LineName,
        desk::{Guest, INVITE_EVERY, Unanswered},
        line::{Line, Pulls, Taken},
    },
};
use stator_router::{Load, Room, backlog};
use tokio::time::{self, Instant};
use tracing::{debug, info, warn};

use crate::handler::Serving;
pub(crate) use promises::{Promises, Work};

/// A worker that was not invited for so long takes no more: the last processor that has a line is gone.
const FORGOTTEN: Duration = INVITE_EVERY.saturating_mul(10);

/// How often it is looked for what nobody says: promises that are over, connections that are lost.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How long tickets of a processor that did not answer are given back unasked, and at most those of one that has nothing
/// for this worker.
const SILENT_FOR: Duration = Duration::from_secs(2);

/// Takes prompts for a worker.
pub(crate) struct InLine<'a> {
    serving: &'a Serving,
    nats: &'a Nats,
    worker: &'a WorkerId,
    /// Of the worker's address.
    place: &'a str,
    /// Of the worker's model. An invitation to any other is not one to follow.
    line: LineName,
}

/// The line that the worker takes from.
struct Open {
    pulls: Pulls,
    invited: Instant,
}

/// What was said before, so that it is said once.
#[derive(Default)]
struct Complaint(Option<String>);

impl<'a> InLine<'a> {
    /// - `address`: where processors reach the worker; absent result: they do not by NATS.
    /// - `line`: of its model.
    pub(crate) fn new(
        serving: &'a Serving,
        nats: &'a Nats,
        worker: &'a WorkerId,
        address: &'a Address,
        line: LineName,
    ) -> Option<Self> {
        let Address::Nats(place) = address else {
            return None;
        };
        Some(Self {
            serving,
            nats,
            worker,
            place,
            line,
        })
    }

    /// Takes prompts whenever it is invited and has room. Runs until it is dropped.
    pub(crate) async fn run(&self) {
        let mut guest = loop {
            match Guest::listen(self.nats, self.place, self.worker.clone()).await {
                Ok(guest) => break guest,
                Err(error) => debug!(%error, "not to be invited yet"),
            }
            time::sleep(INVITE_EVERY).await;
        };
        let mut open: Option<Open> = None;
        let mut leaves: HashMap<String, Instant> = HashMap::new();
        let mut complaint = Complaint::default();
        loop {
            if open.as_ref().is_some_and(Open::is_over) {
                debug!("takes no more prompts from the line");
                open = None;
            }
            if let Some(line) = &mut open
                && !self.with_room().is_empty()
                && let Err(error) = line.pulls.ask().await
            {
                complaint.say(&error);
                open = None;
            }
            tokio::select! {
                (invitation, desk) = guest.invited() => {
                    match self.enter(&mut open, invitation).await {
                        Ok(true) => guest.accept(desk).await,
                        // That processor keeps its prompts to itself then.
                        Ok(false) => debug!(desk, "invited to another line"),
                        Err(error) => complaint.say(&error),
                    }
                }
                taken = next(&mut open) => match taken {
                    Ok(Some(taken)) => {
                        complaint = Complaint::default();
                        self.see_to(taken, &guest, &mut leaves).await;
                    }
                    Ok(None) => {}
                    // Opened again when it is invited.
                    Err(error) => {
                        complaint.say(&error);
                        open = None;
                    }
                },
                () = self.serving.count.left() => {}
                () = time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// Opens the line of an invitation, if it is not open, and says whether it is: a worker takes from its model's only.
    async fn enter(
        &self,
        open: &mut Option<Open>,
        Invitation { line: name }: Invitation,
    ) -> Result<bool, LineError> {
        if name != self.line {
            return Ok(false);
        }
        if let Some(open) = open {
            open.invited = Instant::now();
            return Ok(true);
        }
        let line = Line::open(self.nats, &name).await?;
        let pulls = line.pulls(self.worker).await?;
        info!(
            line = name.stream,
            "takes prompts from the line when it has room"
        );
        *open = Some(Open {
            pulls,
            invited: Instant::now(),
        });
        Ok(true)
    }

    /// Offers to compute the prompt of a ticket.
    ///
    /// - `leaves`: until when it leaves the tickets of a desk alone.
    async fn see_to(&self, taken: Taken, guest: &Guest, leaves: &mut HashMap<String, Instant>) {
        let Some(ticket) = taken.ticket().cloned() else {
            return taken.done().await;
        };
        let ranks = self.with_room();
        if ranks.is_empty() {
            // Asked for when there was room.
            return taken.back(None).await;
        }
        let now = Instant::now();
        leaves.retain(|_, until| now < *until);
        if let Some(until) = leaves.get(&ticket.desk) {
            return taken.back(Some(*until - now)).await;
        }
        match guest.offer(&ticket, ranks).await {
            Ok(Answer::Sent {
                request,
                rank,
                tokens,
            }) => {
                self.serving.promises.promised(request, rank, tokens);
                taken.done().await;
            }
            Ok(Answer::Over) | Err(Unanswered::Gone) => taken.done().await,
            Ok(Answer::Later { ms }) => {
                // Of all that wait there none is for this worker.
                let pause = Duration::from_millis(ms).min(SILENT_FOR);
                leaves.insert(ticket.desk, Instant::now() + pause);
                taken.back(Some(pause)).await;
            }
            Err(Unanswered::Silent) => {
                debug!(desk = ticket.desk, "a processor does not answer");
                leaves.insert(ticket.desk, Instant::now() + SILENT_FOR);
                taken.back(Some(SILENT_FOR)).await;
            }
        }
    }

    /// Returns the ranks that have room for a prompt.
    fn with_room(&self) -> Vec<u32> {
        let active = self.serving.active();
        let roomy = active.filter(|active| {
            let info = active.engine.info();
            let (requests, tokens) = active.requests.work();
            let coming = self.serving.promises.to(active.rank);
            let load = Load {
                requests: requests + coming.requests,
                prefill_tokens: tokens.saturating_add(coming.tokens),
                ..Load::default()
            };
            let room = Room {
                requests: match info.max_num_seqs {
                    0 => u64::MAX,
                    most => most.into(),
                },
                kv_tokens: u64::MAX,
            };
            backlog::has_room(&load, room, info.max_num_batched_tokens.into())
        });
        roomy.map(|active| active.rank).collect()
    }
}

impl Open {
    fn is_over(&self) -> bool {
        self.pulls.is_over() || self.invited.elapsed() > FORGOTTEN
    }
}

impl Complaint {
    fn say(&mut self, error: &LineError) {
        let text = error.to_string();
        if self.0.as_ref() != Some(&text) {
            warn!(%error, "cannot take prompts from the line; processors send them by themselves");
            self.0 = Some(text);
        }
    }
}

/// Waits for the next ticket. Cancel safe.
async fn next(open: &mut Option<Open>) -> Result<Option<Taken>, LineError> {
    match open {
        Some(open) => open.pulls.next().await,
        None => std::future::pending().await,
    }
}
