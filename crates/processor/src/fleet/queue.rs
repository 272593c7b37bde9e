//! Prompts that wait here until a prefill worker has room (`--prefill-dispatch queue`).
//!
//! One queue per model, held by this processor: several processors have a queue each, and know of each other what their
//! workers' loads say. Where all prefill workers are reached over NATS, whose turn it is is decided for all processors
//! together: then those who wait here also stand in a line there ([`line`]), and workers ask for them. Which of those
//! that wait a free worker takes is [`Backlog`]'s to decide; here is who waits, and when that is asked: when a prompt
//! comes, when a leg ends, when workers come, and now and then for what happens by itself (a worker is connected again,
//! or no longer avoided).
//!
//! Nobody has to give anything back: who stops waiting leaves the queue, or gives up what it was just given.

pub(super) mod desk;
mod line;
mod tickets;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics::Histogram;
use parking_lot::Mutex;
use smallvec::SmallVec;
use stator_common::Code;
use stator_common::proto::worker::GenerateRequest;
use stator_router::Measured;
use stator_router::backlog::{Backlog, Fit, Place, Seat};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::handoff::{Failures, no_pair};
use super::{Order, Rules};
use crate::pool::{Ask, Availability, Booked, DispatchError, Pool, Target};
use tickets::Tickets;

/// How often it is looked whether workers take prompts again that took none, without anybody saying so.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long prompts wait for a worker that is known and not connected: connections that break are mostly there again
/// within this time.
const AWAY: Duration = Duration::from_secs(5);

/// How long prompts wait for the caches of busy workers while another has room. A worker that is that long about what
/// it was given is slower than was thought.
const STALLED: Duration = Duration::from_secs(3);

/// Prompts that wait for prefill workers with room.
pub(super) struct Queue {
    prefill: Arc<Pool>,
    /// Where prompts go on from there.
    decode: Arc<Pool>,
    backlog: Mutex<Backlog<Waiter>>,
    /// Since when some wait although a worker has room.
    stalled: Mutex<Option<Instant>>,
    /// Prompts that may wait.
    most: usize,
    waited: Histogram,
    measured: Arc<Mutex<Measured>>,
    tickets: Mutex<Tickets>,
}

/// Somebody who waits.
struct Waiter {
    order: Order,
    /// What a prefill worker is asked for.
    prompt: GenerateRequest,
    tried: Failures,
    granted: oneshot::Sender<Booked>,
    /// Since when nobody who could take it is connected.
    lonely: Mutex<Option<Instant>>,
    since: Instant,
    /// Of the ticket by which it is in line; [`tickets::NONE`]: it is served from here.
    number: AtomicU64,
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
        if let Some(left) = &left {
            let number = left.number.load(Ordering::Relaxed);
            self.queue.tickets.lock().forget(number);
        }
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
    /// - `measured`: how fast workers are.
    pub(super) fn new(
        prefill: &Arc<Pool>,
        decode: &Arc<Pool>,
        rules: &Rules,
        waited: Histogram,
        measured: Arc<Mutex<Measured>>,
    ) -> Self {
        Self {
            prefill: Arc::clone(prefill),
            decode: Arc::clone(decode),
            backlog: Mutex::default(),
            stalled: Mutex::default(),
            most: rules.most_waiting,
            waited,
            measured,
            tickets: Mutex::default(),
        }
    }

    /// Returns a place behind all others.
    pub(super) fn place(&self) -> Place {
        self.backlog.lock().place()
    }

    /// Waits until a worker has room for a prompt, and books it there.
    ///
    /// A prompt that comes and finds no room is refused if too many wait; one that comes back is not.
    ///
    /// Dropping the future ends the wait.
    ///
    /// - `place`: where it waits; one that failed at a worker comes back to its own.
    /// - `tried`: workers that had it.
    ///
    /// # Errors
    /// No worker that could take it is left, or too many wait ([`Code::Overloaded`]).
    pub(super) async fn wait(
        self: &Arc<Self>,
        order: &Order,
        place: Place,
        tried: Failures,
    ) -> Result<(Turn, Booked), DispatchError> {
        let since = Instant::now();
        let (grant, granted) = oneshot::channel();
        let waiter = Waiter {
            order: order.clone(),
            prompt: order.prompt(),
            tried,
            granted: grant,
            lonely: Mutex::default(),
            since,
            number: AtomicU64::new(tickets::NONE),
        };
        let is_new = waiter.tried.is_empty();
        let work = self.prefill.least_work(&waiter.ask());
        self.insert(place, work, waiter);
        let mut wait = Wait {
            queue: self,
            place,
            granted,
        };
        self.serve();
        let booked = match wait.granted.try_recv() {
            Ok(booked) => booked,
            Err(_) => {
                let others = self.backlog.lock().len().saturating_sub(1);
                if is_new && others >= self.most {
                    return Err(self.full(others));
                }
                (&mut wait.granted).await.map_err(|_| no_pair(order))?
            }
        };
        self.waited.record(since.elapsed());
        Ok((self.turn(), booked))
    }

    /// Lets somebody wait, in line if that is open and can lead to every worker that may have it.
    fn insert(&self, place: Place, work: u64, waiter: Waiter) {
        let ask = waiter.ask();
        let enters = waiter.tried.is_empty() && ask.pinned.is_none() && self.is_shared();
        let first = enters.then(|| self.prefers(&ask)).flatten();
        // Nobody asks for it, and the line is not closed, before it is here.
        let mut backlog = self.backlog.lock();
        // Who would be one too many has room now, or none.
        if enters && backlog.len() < self.most {
            let number = self.tickets.lock().enter(place, first);
            waiter.number.store(number, Ordering::Relaxed);
        }
        backlog.insert(place, work, waiter);
    }

    fn full(&self, waiting: usize) -> DispatchError {
        let message = format!(
            "{waiting} prompts already wait for a prefill worker, the limit is {}",
            self.most
        );
        DispatchError::new(Code::Overloaded, message)
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
            prompts += load.prompts;
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
        let now = Instant::now();
        let lost = backlog.remove_if(|waiter| self.is_lost(waiter, now));
        self.forget_tickets(&lost);
        drop(backlog);
        // Their ends are told by this.
        drop(lost);
        self.leave_before_they_lapse(now);
        self.leave_where_nobody_asks(now);
        self.serve();
        if self.is_stalled(now) {
            let mut backlog = self.backlog.lock();
            backlog.hurry(|waiter| !waiter.is_in_line());
            drop(backlog);
            self.serve();
        }
    }

    /// Says whether nobody will take a prompt: those who could are gone, or have been away for too long.
    fn is_lost(&self, waiter: &Waiter, now: Instant) -> bool {
        let mut lonely = waiter.lonely.lock();
        if self.could_serve(&waiter.order) {
            *lonely = None;
            return false;
        }
        let ask = waiter.order.ask(&waiter.order.request);
        let is_known = self.prefill.knows(&waiter.ask()) && self.decode.knows(&ask);
        !is_known || now.duration_since(*lonely.get_or_insert(now)) >= AWAY
    }

    /// Says whether some have waited for too long although a worker has room.
    fn is_stalled(&self, now: Instant) -> bool {
        let waits = self
            .backlog
            .lock()
            .iter()
            .any(|waiter| !waiter.is_in_line());
        let mut stalled = self.stalled.lock();
        if !waits
            || !self
                .prefill
                .targets()
                .iter()
                .any(|target| seat(target).room)
        {
            *stalled = None;
            return false;
        }
        let is_over = now.duration_since(*stalled.get_or_insert(now)) >= STALLED;
        if is_over {
            *stalled = None;
        }
        is_over
    }

    /// Lets workers with room take prompts, until there is no such worker or nobody waits whom it is to have.
    pub(super) fn serve(&self) {
        let mut backlog = self.backlog.lock();
        while !backlog.is_empty() {
            let targets = self.prefill.targets();
            let seats: SmallVec<[Seat; 16]> = targets.iter().map(|target| seat(target)).collect();
            let next = backlog.next(&seats, |waiter, out| self.fits(waiter, &targets, out));
            let Some(next) = next else {
                return;
            };
            let among: SmallVec<[Arc<Target>; 16]> = next
                .targets
                .iter()
                .map(|nth| targets[*nth].clone())
                .collect();
            let booked = backlog.get(next.place).and_then(|waiter| {
                self.prefill.choose(&Ask {
                    among: Some(&among),
                    ..waiter.ask()
                })
            });
            let Some(booked) = booked else {
                return;
            };
            if let Some(waiter) = backlog.take(next.place) {
                // Who stopped waiting at this moment: what was booked goes at once.
                drop(waiter.granted.send(booked));
            }
        }
    }

    /// Writes what each target has of a prompt, where it may have it now.
    fn fits(&self, waiter: &Waiter, targets: &[Arc<Target>], out: &mut [Option<Fit>]) {
        if waiter.is_in_line() {
            return;
        }
        let ask = waiter.ask();
        let suits = |target: &Arc<Target>| {
            target.availability() != Availability::Absent && self.suits(&waiter.order, &ask, target)
        };
        let suits: SmallVec<[bool; 16]> = targets.iter().map(suits).collect();
        // Those that failed a moment ago are for those whom nobody else takes, and so are those that had this prompt.
        let is_first_choice = |target: &Target| {
            target.availability() == Availability::Open
                && !waiter.tried.iter().any(|failed| failed.covers(target))
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

impl Waiter {
    fn ask(&self) -> Ask<'_> {
        self.order.ask_prefill(&self.prompt)
    }
}
