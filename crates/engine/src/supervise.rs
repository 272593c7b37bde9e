//! Watches one engine until it is gone, and clears away what is left of it.
//!
//! No one signal is enough, so there are four: the end of its process, its own `ENGINE_CORE_DEAD`, the
//! loss of its connection, and silence after a question.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, channel::mpsc as zmq_mpsc};
use tokio::{
    sync::{
        mpsc,
        oneshot::{self, error::TryRecvError},
        watch,
    },
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};
use zeromq::{SocketEvent, SocketRecv};

use crate::{
    config::Waits,
    engine::CLIENT_INDEX,
    local::Local,
    receive::{Control, Shared},
    rundir::{Endpoints, RunDir},
    sockets::Incoming,
    state::{DeadReason, State},
    utilities::Answer,
    wire,
};

/// How long a local engine's other signals may take after its connection broke. A connection within a
/// machine breaks only when a process ends, so nothing is waited for but a better explanation.
const LOCAL_GRACE: Duration = Duration::from_millis(500);
/// An engine that sends outputs but leaves a question unanswered for this long, and for this many
/// messages, does not hear us any more (its input thread died).
const DEAF_AFTER: Duration = Duration::from_secs(30);
const DEAF_MESSAGES: u64 = 256;
/// A dead engine's remains are asked to end for this long, then killed.
const DEAD_GRACE: Duration = Duration::from_secs(2);
/// Answered between two steps, and does nothing. An engine that does not know it answers too.
const PROBE: &str = "is_scheduler_paused";

/// The supervisor of one engine.
pub(crate) struct Supervisor {
    pub(crate) run_dir: RunDir,
    pub(crate) endpoints: Endpoints,
    pub(crate) identity: Bytes,
    pub(crate) local: Option<Local>,
    pub(crate) keep: bool,
    pub(crate) waits: Waits,
    pub(crate) incoming: Incoming,
    pub(crate) events: zmq_mpsc::Receiver<SocketEvent>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) control: mpsc::Sender<Control>,
    pub(crate) obituary: mpsc::Receiver<()>,
    /// True, or closed: the engine is not needed any more.
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) state: watch::Sender<State>,
}

impl Supervisor {
    /// Watches until the engine is gone or not needed, and clears away.
    pub(crate) async fn run(mut self) {
        let mut reason = self.watch().await;
        let (done, closed) = oneshot::channel();
        let message = reason.to_string();
        if self
            .control
            .send(Control::End { message, done })
            .await
            .is_ok()
        {
            let _ = closed.await;
        }
        let shut_down = reason == DeadReason::ShutDown;
        if let Some(local) = &mut self.local {
            reason = reason.with_log(local.last_words());
        }
        if shut_down {
            info!("engine let go");
        } else {
            error!(%reason, "engine died");
        }
        // Whoever waits for the next engine hears of it now; the directory is ours until all is clear.
        self.state.send_replace(State::Dead(reason));
        let grace = if shut_down {
            self.waits.shutdown
        } else {
            DEAD_GRACE
        };
        match self.local.take() {
            Some(local) if shut_down && self.keep => local.leave(),
            Some(local) => {
                local.clear_away(grace).await;
                self.run_dir.forget();
            }
            None => {}
        }
        drop(self.incoming);
        self.endpoints.wait_until_closed().await;
    }

    async fn watch(&mut self) -> DeadReason {
        let grace = if self.local.is_some() {
            LOCAL_GRACE
        } else {
            self.waits.reconnect
        };
        let mut broken_until: Option<Instant> = None;
        let mut probe = Probe::new(&self.waits);
        loop {
            tokio::select! {
                status = ended(&mut self.local) => return DeadReason::Exited { status, log: None },
                // The sink panicked; nobody takes outputs any more.
                () = self.control.closed() => return DeadReason::Unattended,
                Some(()) = self.obituary.recv() => return DeadReason::Reported { log: None },
                () = stopped(&mut self.stop) => return DeadReason::ShutDown,
                Some(event) = self.events.next() => match event {
                    SocketEvent::Disconnected(peer) if *peer == *self.identity => {
                        warn!("the connection to the engine broke");
                        broken_until = Some(Instant::now() + grace);
                    }
                    SocketEvent::Accepted(_, peer)
                        if *peer == *self.identity && broken_until.take().is_some() =>
                    {
                        warn!("the connection to the engine is back");
                        let _ = self.control.send(Control::Broken).await;
                    }
                    _ => {}
                },
                // Nothing is expected here any more; receiving is what notices a lost connection.
                _ = self.incoming.recv() => {}
                () = sleep_until(broken_until.unwrap_or_else(Instant::now)), if broken_until.is_some() => {
                    return DeadReason::Unreachable;
                }
                () = sleep_until(probe.next) => {
                    if let Some(silence) = probe.tick(&self.shared) {
                        return DeadReason::Silent { seconds: silence.as_secs() };
                    }
                }
            }
        }
    }
}

/// Waits until somebody says stop, or nobody is left who could.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn ended(local: &mut Option<Local>) -> String {
    match local {
        Some(local) => local.ended(|_| {}).await,
        None => std::future::pending().await,
    }
}

/// Asks for signs of life.
struct Probe {
    interval: Duration,
    deadline: Duration,
    next: Instant,
    /// When the number of messages heard last changed, and that number.
    heard: (Instant, u64),
    asked: Option<Asked>,
}

struct Asked {
    at: Instant,
    heard: u64,
    answer: oneshot::Receiver<Answer>,
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Ask,
    /// The question may queue behind a long step.
    Wait,
    Dead {
        silence: Duration,
    },
}

impl Probe {
    fn new(waits: &Waits) -> Self {
        let now = Instant::now();
        Self {
            interval: waits.probe_interval,
            deadline: waits.probe_deadline,
            next: now + waits.probe_interval,
            heard: (now, 0),
            asked: None,
        }
    }

    /// Judges by what has been heard since the last question.
    fn judge(&mut self, now: Instant, heard: u64) -> Verdict {
        if heard != self.heard.1 {
            self.heard = (now, heard);
        }
        let Some(asked) = &mut self.asked else {
            return Verdict::Ask;
        };
        if !matches!(asked.answer.try_recv(), Err(TryRecvError::Empty)) {
            return Verdict::Ask;
        }
        let waited = now - asked.at;
        let silent = now - asked.at.max(self.heard.0);
        let deaf = waited >= DEAF_AFTER && heard - asked.heard >= DEAF_MESSAGES;
        if deaf || silent >= self.deadline {
            Verdict::Dead { silence: waited }
        } else {
            Verdict::Wait
        }
    }

    /// Looks at the last question, and asks the next one; returns how long the engine has been silent
    /// if that is too long.
    fn tick(&mut self, shared: &Shared) -> Option<Duration> {
        let now = Instant::now();
        self.next = now + self.interval;
        let heard = shared.heard.count();
        match self.judge(now, heard) {
            Verdict::Ask => {}
            Verdict::Wait => return None,
            Verdict::Dead { silence } => return Some(silence),
        }
        let call = shared.utilities.open()?;
        let payload = shared
            .codec
            .encode_utility(CLIENT_INDEX, call.id, PROBE, &[]);
        if shared.live.lock().send(wire::UTILITY, payload).is_ok() {
            self.asked = Some(Asked {
                at: now,
                heard,
                answer: call.answer,
            });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(at: Instant) -> (Probe, oneshot::Sender<Answer>) {
        let (sender, answer) = oneshot::channel();
        let waits = Waits {
            probe_deadline: Duration::from_secs(180),
            ..Waits::default()
        };
        let mut probe = Probe::new(&waits);
        probe.asked = Some(Asked {
            at,
            heard: 0,
            answer,
        });
        (probe, sender)
    }

    #[tokio::test]
    async fn a_long_step_is_waited_out_and_silence_beyond_the_deadline_is_death() {
        let start = Instant::now();
        let (mut probe, _engine) = asked(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(probe.judge(after(179), 0), Verdict::Wait);
        // One message, and the patience begins anew.
        assert_eq!(probe.judge(after(200), 1), Verdict::Wait);
        assert_eq!(probe.judge(after(379), 1), Verdict::Wait);
        let silence = Duration::from_secs(380);
        assert_eq!(probe.judge(after(380), 1), Verdict::Dead { silence });
    }

    #[tokio::test]
    async fn an_engine_that_talks_but_never_listens_is_dead() {
        let start = Instant::now();
        let (mut probe, _engine) = asked(start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(probe.judge(after(29), 5000), Verdict::Wait);
        let silence = Duration::from_secs(31);
        assert_eq!(probe.judge(after(31), 5001), Verdict::Dead { silence });
    }

    #[tokio::test]
    async fn an_answered_question_is_followed_by_the_next() {
        let (mut probe, engine) = asked(Instant::now());
        engine
            .send(Err("no such method".to_owned()))
            .expect("it waits");
        assert_eq!(probe.judge(Instant::now(), 1), Verdict::Ask);
    }
}
