//! When a process stops: the one place that knows signals.
//!
//! The first SIGTERM or SIGINT says *draining* (leave discovery, refuse new work with
//! [`Code::Draining`](crate::Code::Draining), finish what runs), the deadline after it says
//! *aborting*, a second signal ends the process at once.

use std::{io, time::Duration};

use tokio::{sync::watch, time};
use tracing::{info, warn};

/// How far the end has come. It never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Everything is served.
    Running,
    /// What runs is finished, nothing new is taken.
    Draining,
    /// What still runs is ended.
    Aborting,
}

/// Tells its holder when to stop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
}

/// Says when to stop; `run` holds one, tests make their own.
#[derive(Debug)]
pub struct Trigger {
    phase: watch::Sender<Phase>,
}

/// Returns a drain and what triggers it.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(Phase::Running);
    (Trigger { phase: sender }, Drain { phase: receiver })
}

impl Trigger {
    /// Starts draining.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// Ends what still runs.
    pub fn abort(&self) {
        self.advance(Phase::Aborting);
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }
}

impl Drain {
    /// Returns the phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits until nothing new may be taken. Cancel safe. A dropped [`Trigger`] counts.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits until what still runs must end. Cancel safe. A dropped [`Trigger`] counts.
    pub async fn aborting(&self) {
        self.reached(Phase::Aborting).await;
    }

    async fn reached(&self, phase: Phase) {
        let mut receiver = self.phase.clone();
        // An error means that the trigger is gone: whoever could say more has ended.
        let _ = receiver.wait_for(|now| *now >= phase).await;
    }
}

/// Runs a process until it ends by itself or by signals.
///
/// `serve` gets the drain and is expected to return soon after *draining* if nothing runs, and in any
/// case soon after *aborting*, `grace` later. A second signal ends the process with status 130.
///
/// # Errors
/// Those of `serve`, and of installing signal handlers.
pub async fn run<F, E>(grace: Duration, serve: impl FnOnce(Drain) -> F) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
    E: From<io::Error>,
{
    let mut signals = Signals::install()?;
    let (trigger, drain) = channel();
    let serve = serve(drain);
    tokio::pin!(serve);

    tokio::select! {
        done = &mut serve => return done,
        name = signals.next() => info!(signal = name, grace_s = grace.as_secs(), "draining; a second signal ends the process"),
    }
    trigger.drain();
    let deadline = time::sleep(grace);
    tokio::pin!(deadline);
    let mut aborted = false;
    loop {
        tokio::select! {
            done = &mut serve => return done,
            () = &mut deadline, if !aborted => {
                warn!("the grace period is over: ending what still runs");
                trigger.abort();
                aborted = true;
            }
            name = signals.next() => {
                warn!(signal = name, "second signal: ending now");
                std::process::exit(130);
            }
        }
    }
}

struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn install() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_phase_is_reached_once_and_never_left() {
        let (trigger, drain) = channel();
        assert_eq!(drain.phase(), Phase::Running);
        trigger.abort();
        trigger.drain();
        drain.draining().await;
        drain.aborting().await;
        assert_eq!(drain.phase(), Phase::Aborting);
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_by_itself_is_not_waited_for() {
        let result: io::Result<()> = run(Duration::from_secs(30), |_| async { Ok(()) }).await;
        result.unwrap();
    }
}
