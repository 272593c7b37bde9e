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

    /// Looks at the last question, and asks the next one; returns how long the engine has been silent
    /// if that is too long.
    fn tick(&mut self, shared: &Shared) -> Option<Duration> {
        let now = Instant::now();
        self.next = now + self.interval;
        let heard = shared.heard.count();
        if heard != self.heard.1 {
            self.heard = (now, heard);
        }
        if let Some(asked) = &mut self.asked
            && matches!(asked.answer.try_recv(), Err(TryRecvError::Empty))
        {
            let waited = now - asked.at;
            let silent = now - asked.at.max(self.heard.0);
            let deaf = waited >= DEAF_AFTER && heard - asked.heard >= DEAF_MESSAGES;
            return (deaf || silent >= self.deadline).then_some(waited);
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
