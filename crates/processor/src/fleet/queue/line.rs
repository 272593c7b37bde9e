//! Prompts of this queue that stand in the line which processors share: by which ticket, and which worker with room gets
//! which of them.
//!
//! A prompt stays in this queue whatever stands for it elsewhere. Who is in line is not given to workers from here, until
//! it leaves the line: because a worker took it, or because the line is closed, or cannot lead to it. Then it is
//! served as if there were no line. So nothing that happens to the line can lose a prompt; it can only make several
//! processors decide each for itself, as they do without.
//!
//! A worker that has a ticket gets the prompt that suits it best, not the one that the ticket was written for; that one
//! then stands in line by the other's ticket. A prompt is kept from workers that have less of it cached than another
//! for as long as it would take them to compute what they lack.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::SmallVec;
use stator_common::WorkerId;
use stator_common::tickets::{Answer, Offer, line};
use stator_router::backlog::{Backlog, Claim, Fit, Pulled};
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;
use tracing::debug;

use super::tickets::{NONE, Put};
use super::{Queue, STALLED, Waiter};
use crate::pool::{Ask, Availability, Target};

/// How long a prompt is kept for workers that have more of it cached, at most.
const MOST_KEPT: Duration = Duration::from_secs(2);

/// What a token takes to compute while nobody has measured it: a tenth of what fast engines reach, so that caches count.
const UNMEASURED: Duration = Duration::from_micros(50);

/// Below this nobody is preferred: a worker asks and is answered in about that time.
const LEAST_KEPT: Duration = Duration::from_millis(2);

/// The longest pause of a ticket: others that may have it at once should not wait for it for long.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How long a worker leaves the prompts of this queue alone, none of which is for it.
const NOT_FOR_IT: Duration = Duration::from_millis(200);

/// When prompts leave the line, before the server drops their tickets.
const MOST_IN_LINE: Duration = line::MAX_AGE.saturating_sub(Duration::from_secs(60));

impl Waiter {
    /// Says whether it is in line.
    pub(super) fn is_in_line(&self) -> bool {
        self.number.load(Ordering::Relaxed) != NONE
    }
}

impl Queue {
    /// Opens the line: prompts that come from now on enter it.
    pub(super) fn open_line(&self, clerk: UnboundedSender<Put>) {
        self.tickets.lock().open(clerk);
    }

    /// Closes the line: those in it are served from here.
    pub(super) fn close_line(&self) {
        let backlog = self.backlog.lock();
        self.tickets.lock().close();
        for waiter in backlog.iter() {
            waiter.number.store(NONE, Ordering::Relaxed);
        }
        drop(backlog);
        self.serve();
    }

    /// Says whether prompts wait in a line that processors share.
    pub(in crate::fleet) fn is_shared(&self) -> bool {
        self.tickets.lock().is_open()
    }

    /// Lets anybody have a prompt that was kept for somebody, if it still waits.
    pub(super) fn let_anybody(&self, number: u64) {
        self.tickets.lock().let_anybody(number);
    }

    /// Returns the number of the latest ticket.
    pub(super) fn last_ticket(&self) -> u64 {
        self.tickets.lock().last()
    }

    /// Says whether somebody waits by a ticket of then or before.
    ///
    /// - `then`: the latest ticket at that time.
    pub(super) fn waits_since(&self, then: u64) -> bool {
        self.tickets.lock().waits_since(then)
    }

    /// Lets a prompt be served from here, if it is in line by this ticket.
    pub(super) fn leave_line(&self, number: u64) {
        let backlog = self.backlog.lock();
        self.leave(&backlog, number);
        drop(backlog);
        self.serve();
    }

    fn leave(&self, backlog: &Backlog<Waiter>, number: u64) {
        let place = self.tickets.lock().forget(number);
        if let Some(waiter) = place.and_then(|place| backlog.get(place)) {
            waiter.number.store(NONE, Ordering::Relaxed);
        }
    }

    /// Lets those leave the line whose tickets the server is about to drop.
    pub(super) fn leave_before_they_lapse(&self, now: Instant) {
        let backlog = self.backlog.lock();
        let old = self.tickets.lock().older(MOST_IN_LINE, now);
        old.into_iter()
            .for_each(|number| self.leave(&backlog, number));
    }

    /// Lets those leave the line for whom a worker has been idle that could have asked for them: something is wrong with
    /// the line, or with that worker's view of it.
    pub(super) fn leave_where_nobody_asks(&self, now: Instant) {
        let backlog = self.backlog.lock();
        let targets = self.prefill.targets();
        let free: SmallVec<[&Arc<Target>; 16]> = targets.iter().filter(is_idle).collect();
        let mut tickets = self.tickets.lock();
        if tickets.is_empty() {
            tickets.idle.clear();
            return;
        }
        let idle = &mut tickets.idle;
        idle.retain(|worker, _| free.iter().any(|target| target.worker.id() == worker));
        let unasked = |target: &&Arc<Target>| {
            let since = *idle.entry(target.worker.id().clone()).or_insert(now);
            now.duration_since(since) >= STALLED
        };
        let unasked: SmallVec<[&Arc<Target>; 16]> = free.iter().copied().filter(unasked).collect();
        if unasked.is_empty() {
            return;
        }
        let old = tickets.older(STALLED, now);
        drop(tickets);
        let mut left = 0;
        for number in old {
            let waiter = self.by_ticket(&backlog, number);
            let suits = waiter.is_some_and(|waiter| {
                let ask = waiter.ask();
                let mut unasked = unasked.iter();
                unasked.any(|target| self.suits(&waiter.order, &ask, target))
            });
            if suits {
                self.leave(&backlog, number);
                left += 1;
            }
        }
        if left > 0 {
            debug!(
                prompts = left,
                "an idle worker does not ask for prompts; they leave the line"
            );
        }
    }

    /// Forgets the tickets of those who do not wait any more.
    pub(super) fn forget_tickets(&self, gone: &[Waiter]) {
        let mut tickets = self.tickets.lock();
        for waiter in gone {
            tickets.forget(waiter.number.load(Ordering::Relaxed));
        }
    }

    /// Returns who waits by a ticket.
    fn by_ticket<'a>(&self, backlog: &'a Backlog<Waiter>, number: u64) -> Option<&'a Waiter> {
        let place = self.tickets.lock().place(number)?;
        backlog.get(place)
    }

    /// Returns who is to have a prompt first, and for how long.
    pub(super) fn prefers(&self, ask: &Ask<'_>) -> Option<(WorkerId, Duration)> {
        let targets = self.prefill.targets();
        let fits = self.fits_of(ask, &targets);
        let open = targets
            .iter()
            .zip(&fits)
            .filter(|(target, _)| target.availability() == Availability::Open);
        let cached = |fit: &Option<Fit>| fit.map_or(0, |fit| fit.cached);
        let (first, most) = open
            .clone()
            .map(|(target, fit)| (target.worker.id(), cached(fit)))
            .max_by_key(|(_, cached)| *cached)?;
        let others = open.filter(|(target, _)| target.worker.id() != first);
        let next = others.map(|(_, fit)| cached(fit)).max()?;
        let kept = self.kept(most - next);
        (kept >= LEAST_KEPT).then(|| (first.clone(), kept))
    }

    /// Returns how long a prompt is kept from a worker that lacks so many tokens more than another.
    fn kept(&self, lacks: u64) -> Duration {
        if lacks == 0 {
            return Duration::ZERO;
        }
        let measured = self.measured.lock().prefill;
        let seconds = match (measured.at(lacks as f64), measured.at(0.0)) {
            (Some(at), Some(start)) => at - start,
            _ => UNMEASURED.as_secs_f64() * lacks as f64,
        };
        Duration::try_from_secs_f64(seconds).map_or(MOST_KEPT, |kept| kept.min(MOST_KEPT))
    }

    /// Answers a worker that has room and a ticket.
    pub(super) fn answer(&self, offer: &Offer) -> Answer {
        let answer = self.try_answer(offer);
        if answer == Answer::Over {
            // Somebody may have left the line, who is to be served now.
            self.serve();
        }
        answer
    }

    fn try_answer(&self, offer: &Offer) -> Answer {
        let mut backlog = self.backlog.lock();
        let mut tickets = self.tickets.lock();
        tickets.idle.remove(&offer.worker);
        if !tickets.waits(offer.number) {
            return Answer::Over;
        }
        drop(tickets);
        let targets = self.prefill.targets();
        let is_meant = |target: &&Arc<Target>| {
            let rank = target.dp_rank.unwrap_or(0);
            *target.worker.id() == offer.worker
                && offer.ranks.contains(&rank)
                && target.availability() == Availability::Open
        };
        let among: SmallVec<[Arc<Target>; 16]> = targets.iter().filter(is_meant).cloned().collect();
        if among.is_empty() {
            return self.decline(&backlog, offer, &targets);
        }
        let now = Instant::now();
        let pulled = backlog.pull(targets.len(), |waiter| {
            self.claim(waiter, &targets, &among, now)
        });
        let place = match pulled {
            Pulled::Take(place) => place,
            Pulled::Later(pause) => {
                let pause = pause.clamp(LEAST_KEPT, LONGEST_PAUSE);
                return later(pause);
            }
            Pulled::Nothing => return self.decline(&backlog, offer, &targets),
        };
        let booked = backlog.get(place).and_then(|waiter| {
            self.prefill.choose(&Ask {
                among: Some(&among),
                ..waiter.ask()
            })
        });
        let Some(booked) = booked else {
            self.leave(&backlog, offer.number);
            return Answer::Over;
        };
        let Some(waiter) = backlog.take(place) else {
            return Answer::Over;
        };
        self.pass_on(&backlog, offer.number, &waiter);
        let answer = Answer::Sent {
            request: waiter.order.request.request_id.clone(),
            rank: booked.target().dp_rank.unwrap_or(0),
            tokens: booked.uncached(),
        };
        // Who stopped waiting at this moment: what was booked goes at once.
        drop(waiter.granted.send(booked));
        answer
    }

    /// Answers a worker for which there is nothing from here: its ticket is for others, if there are any.
    fn decline(&self, backlog: &Backlog<Waiter>, offer: &Offer, targets: &[Arc<Target>]) -> Answer {
        let has_others = self.by_ticket(backlog, offer.number).is_some_and(|waiter| {
            let ask = waiter.ask();
            targets.iter().any(|target| {
                target.availability() == Availability::Open
                    && self.suits(&waiter.order, &ask, target)
            })
        });
        debug!(worker = %offer.worker, has_others, "a worker asks that is not to have what waits here");
        if has_others {
            return later(NOT_FOR_IT);
        }
        self.leave(backlog, offer.number);
        Answer::Over
    }

    /// Gives the ticket of somebody who was served by another's to that one.
    fn pass_on(&self, backlog: &Backlog<Waiter>, used: u64, served: &Waiter) {
        let own = served.number.load(Ordering::Relaxed);
        let still_waits = |place| backlog.get(place).is_some();
        let passed = self.tickets.lock().pass_on(used, own, still_waits);
        if let Some(waiter) = passed.and_then(|place| backlog.get(place)) {
            waiter.number.store(own, Ordering::Relaxed);
        }
    }

    /// Says whether a prompt may go to a worker now.
    ///
    /// - `among`: those of its ranks that have room.
    fn claim(
        &self,
        waiter: &Waiter,
        targets: &[Arc<Target>],
        among: &[Arc<Target>],
        now: Instant,
    ) -> Claim {
        if !waiter.is_in_line() {
            return Claim::Never;
        }
        let ask = waiter.ask();
        // Before anything is looked up for it.
        if !among
            .iter()
            .any(|target| self.suits(&waiter.order, &ask, target))
        {
            return Claim::Never;
        }
        let fits = self.fits_of(&ask, targets);
        let mut most = 0;
        let mut here = None;
        for (target, fit) in targets.iter().zip(&fits) {
            let cached = fit.map_or(0, |fit| fit.cached);
            let suits = target.availability() == Availability::Open
                && self.suits(&waiter.order, &ask, target);
            if !suits {
                continue;
            }
            most = most.max(cached);
            if among.iter().any(|one| Arc::ptr_eq(one, target)) {
                here = here.max(Some(cached));
            }
        }
        let Some(cached) = here else {
            return Claim::Never;
        };
        let kept = self.kept(most - cached);
        let waited = now.duration_since(waiter.since);
        if waited >= kept {
            Claim::Now { cached }
        } else {
            Claim::Later(kept - waited)
        }
    }

    fn fits_of(&self, ask: &Ask<'_>, targets: &[Arc<Target>]) -> SmallVec<[Option<Fit>; 16]> {
        let mut fits = SmallVec::from_elem(None, targets.len());
        self.prefill.fits(ask, targets, &mut fits);
        fits
    }
}

/// Says whether a target does nothing, as far as is known, for whichever processor.
fn is_idle(target: &&Arc<Target>) -> bool {
    target.availability() == Availability::Open
        && target.has_prefill_room()
        && target.load().prefill_tokens == 0
}

/// Lets a worker ask again after a while.
fn later(pause: Duration) -> Answer {
    let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
    Answer::Later { ms }
}
