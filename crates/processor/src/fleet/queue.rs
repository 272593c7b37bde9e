//! Prompts that wait here until a prefill worker has room (`--prefill-dispatch queue`).
//!
//! One queue per model, held by this processor: several processors have a queue each, and know of each other what their
//! workers' loads say. Which of those that wait a free worker takes is [`Backlog`]'s to decide; here is
//! who waits, and when that is asked: when a prompt comes, when a leg ends, when workers come, and now and then for
//! what happens by itself (a worker is connected again, or no longer avoided).
//!
//! Nobody has to give anything back: who stops waiting leaves the queue, or gives up what it was just given.

use std::sync::Arc;
use std::time::Duration;

use metrics::Histogram;
use parking_lot::Mutex;
use smallvec::SmallVec;
use stator_common::Code;
use stator_common::proto::worker::GenerateRequest;
use stator_router::backlog::{Backlog, Fit, Place, Seat};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::handoff::{Failures, no_pair};
use super::{Order, Rules};
use crate::pool::{Ask, Availability, Booked, DispatchError, Pool, Target};

/// How often it is looked whether workers take prompts again that took none, without anybody saying so.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Prompts that wait for prefill workers with room.
pub(super) struct Queue {
    prefill: Arc<Pool>,
    /// Where prompts go on from there.
    decode: Arc<Pool>,
    backlog: Mutex<Backlog<Ticket>>,
    /// Prompts that may wait.
    most: usize,
    waited: Histogram,
}

/// Somebody who waits.
struct Ticket {
    order: Order,
    /// What a prefill worker is asked for.
    prompt: GenerateRequest,
    tried: Failures,
    granted: oneshot::Sender<Booked>,
}

/// A place at a worker, whose end lets others have it. To be dropped after what was booked.
pub(super) struct Turn(Arc<Queue>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.serve();
    }
}

/// What comes before a prompt.
pub(super) struct Ahead {
    pub(super) prompts: u64,
    pub(super) tokens: u64,
}

/// Somebody's wait. Dropped, it is over.
struct Wait<'a> {
    queue: &'a Queue,
    place: Place,
    granted: oneshot::Receiver<Booked>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let left = self.queue.backlog.lock().remove(self.place);
        if left.is_none()
            && let Ok(booked) = self.granted.try_recv()
        {
            drop(booked);
            self.queue.serve();
        }
    }
}

impl Queue {
    /// Returns a queue in which nobody waits.
    ///
    /// - `waited`: is told how long prompts wait.
    pub(super) fn new(
        prefill: &Arc<Pool>,
        decode: &Arc<Pool>,
        rules: &Rules,
        waited: Histogram,
    ) -> Self {
        Self {
            prefill: Arc::clone(prefill),
            decode: Arc::clone(decode),
            backlog: Mutex::default(),
            most: rules.most_waiting,
            waited,
        }
    }

    /// Says whether no more prompts may wait.
    ///
    /// # Errors
    /// [`Code::Overloaded`].
    pub(super) fn admit(&self) -> Result<(), DispatchError> {
        let waiting = self.backlog.lock().len();
        if waiting < self.most {
            return Ok(());
        }
        let message = format!(
            "{waiting} prompts already wait for a prefill worker, the limit is {}",
            self.most
        );
        Err(DispatchError::new(Code::Overloaded, message))
    }

    /// Returns a place behind all others.
    pub(super) fn place(&self) -> Place {
        self.backlog.lock().place()
    }

    /// Waits until a worker has room for a prompt, and books it there.
    ///
    /// Dropping the future ends the wait.
    ///
    /// - `place`: where it waits; one that failed at a worker comes back to its own.
    /// - `tried`: workers that had it.
    ///
    /// # Errors
    /// No worker that could take it is left.
    pub(super) async fn wait(
        self: &Arc<Self>,
        order: &Order,
        place: Place,
        tried: Failures,
    ) -> Result<(Turn, Booked), DispatchError> {
        let since = Instant::now();
        let (grant, granted) = oneshot::channel();
        let ticket = Ticket {
            order: order.clone(),
            prompt: order.prompt(),
            tried,
            granted: grant,
        };
        let work = self.prefill.least_work(&ticket.ask());
        self.backlog.lock().insert(place, work, ticket);
        let mut wait = Wait {
            queue: self,
            place,
            granted,
        };
        self.serve();
        let booked = (&mut wait.granted).await.map_err(|_| no_pair(order))?;
        self.waited.record(since.elapsed());
        Ok((self.turn(), booked))
    }

    /// Returns what lets others have a place once it is dropped.
    pub(super) fn turn(self: &Arc<Self>) -> Turn {
        Turn(Arc::clone(self))
    }

    /// Says whether somebody could take a prompt, now or later.
    pub(super) fn could_serve(&self, order: &Order) -> bool {
        let prompt = order.prompt();
        let ask = order.ask_prefill(&prompt);
        let targets = self.prefill.targets();
        targets.iter().any(|target| {
            target.availability() != Availability::Absent && self.suits(order, &ask, target)
        })
    }

    /// Returns what a worker computes before a prompt that comes now, if all do the same.
    pub(super) fn ahead(&self) -> Ahead {
        let targets = self.prefill.targets();
        let connected = targets
            .iter()
            .filter(|target| target.availability() != Availability::Absent);
        let (waiting, of_waiting) = self.waiting();
        let (mut count, mut prompts, mut tokens) = (0, waiting as u64, of_waiting);
        for target in connected {
            let load = target.load();
            count += 1;
            prompts += load.requests;
            tokens += load.prefill_tokens;
        }
        Ahead {
            prompts: prompts / count.max(1),
            tokens: tokens / count.max(1),
        }
    }

    /// Returns how many prompts wait, and their tokens that no worker has.
    pub(super) fn waiting(&self) -> (usize, u64) {
        let backlog = self.backlog.lock();
        (backlog.len(), backlog.tokens())
    }

    /// Gives those up whom nobody can take any more, and serves the others.
    pub(super) fn look(&self) {
        let mut backlog = self.backlog.lock();
        if backlog.is_empty() {
            return;
        }
        let lost = backlog.remove_if(|ticket| !self.could_serve(&ticket.order));
        drop(backlog);
        // Their ends are told by this.
        drop(lost);
        self.serve();
    }

    /// Lets workers with room take prompts, until there is no such worker or nobody waits whom it is to have.
    pub(super) fn serve(&self) {
        let mut backlog = self.backlog.lock();
        while !backlog.is_empty() {
            let targets = self.prefill.targets();
            let seats: SmallVec<[Seat; 16]> = targets.iter().map(|target| seat(target)).collect();
            let next = backlog.next(&seats, |ticket, out| self.fits(ticket, &targets, out));
            let Some(next) = next else {
                return;
            };
            let among: SmallVec<[Arc<Target>; 16]> = next
                .targets
                .iter()
                .map(|nth| targets[*nth].clone())
                .collect();
            let booked = backlog.get(next.place).and_then(|ticket| {
                self.prefill.choose(&Ask {
                    among: Some(&among),
                    ..ticket.ask()
                })
            });
            let Some(booked) = booked else {
                return;
            };
            if let Some(ticket) = backlog.take(next.place) {
                // Who stopped waiting at this moment: what was booked goes at once.
                drop(ticket.granted.send(booked));
            }
        }
    }

    /// Writes what each target has of a prompt, where it may have it now.
    fn fits(&self, ticket: &Ticket, targets: &[Arc<Target>], out: &mut [Option<Fit>]) {
        let ask = ticket.ask();
        let suits = |target: &Arc<Target>| {
            target.availability() != Availability::Absent && self.suits(&ticket.order, &ask, target)
        };
        let suits: SmallVec<[bool; 16]> = targets.iter().map(suits).collect();
        // Those that failed a moment ago are for those whom nobody else takes, and so are those that had this prompt.
        let is_first_choice = |target: &Target| {
            target.availability() == Availability::Open
                && !ticket.tried.iter().any(|failed| failed.covers(target))
        };
        let mut both = targets.iter().zip(&suits);
        let only_first = both.any(|(target, suits)| *suits && is_first_choice(target));
        self.prefill.fits(&ask, targets, out);
        for ((target, suits), out) in targets.iter().zip(&suits).zip(out) {
            if !suits || (only_first && !is_first_choice(target)) {
                *out = None;
            }
        }
    }

    /// Says whether a prompt may go to a target, and on from there.
    fn suits(&self, order: &Order, ask: &Ask<'_>, target: &Target) -> bool {
        let decode = Ask {
            partner: Some(&*target.worker),
            ..order.ask(&order.request)
        };
        ask.takes(target) && self.decode.has(&decode)
    }
}

/// Returns a target as the decision sees it.
fn seat(target: &Target) -> Seat {
    Seat {
        queued: target.load().prefill_tokens,
        room: target.availability() != Availability::Absent && target.has_prefill_room(),
    }
}

impl Ticket {
    fn ask(&self) -> Ask<'_> {
        self.order.ask_prefill(&self.prompt)
    }
}
