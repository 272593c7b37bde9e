//! The task of a client: dials, greets, reads, and dials again.

use std::{
    io,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::BytesMut;
use futures::future::poll_fn;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time;
use tracing::{debug, info, warn};

use super::{ClientConfig, Link, Shared, State};
use crate::{
    Code,
    plane::tcp::{
        PlaneError, SOFTWARE,
        frame::{self, FrameError, Kind},
        inbound::{Inbound, Lost},
        net::Io,
        outbound::Outbound,
    },
    proto::{
        plane,
        worker::{Error, StepDeltas},
    },
};

/// A worker on the same network answers in milliseconds; this covers one that is starved of CPU.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The wait before the second attempt to connect; it doubles up to [`BACK_OFF_MOST`].
const BACK_OFF_FIRST: Duration = Duration::from_millis(50);

/// The longest wait between two attempts: discovery forgets a dead worker after 10 s anyway.
const BACK_OFF_MOST: Duration = Duration::from_secs(2);

/// Why a connection, or an attempt at one, ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("no answer within {} s", CONNECT_WITHIN.as_secs())]
    NoAnswer,
    #[error(transparent)]
    Lost(#[from] Lost),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("refused: {message}")]
    Refused { code: Code, message: String },
    #[error("nobody uses it any more")]
    Unused,
}

/// Dials and reads for a [`Client`].
pub(super) struct Task {
    pub(super) shared: Weak<Shared>,
    pub(super) address: String,
    pub(super) config: ClientConfig,
}

impl Task {
    /// Runs until the worker refuses for good.
    pub(super) async fn run(self) {
        let mut random = SmallRng::seed_from_u64(self.config.seed);
        let mut wait = BACK_OFF_FIRST;
        loop {
            let greeted = time::timeout(CONNECT_WITHIN, self.greet()).await;
            let ended = match greeted.unwrap_or(Err(Ended::NoAnswer)) {
                Ok((link, inbound)) => {
                    wait = BACK_OFF_FIRST;
                    self.serve(&link, inbound).await
                }
                Err(ended) => ended,
            };
            let Some(shared) = self.shared.upgrade() else {
                return;
            };
            match ended {
                Ended::Refused { code, message } => {
                    warn!(worker = %self.address, %message, "refused by the worker");
                    shared.state.send_replace(State::Gone { code, message });
                    return;
                }
                Ended::Unused => return,
                ended => {
                    debug!(worker = %self.address, reason = %ended, "not connected");
                    shared.state.send_replace(State::Connecting {
                        reason: ended.to_string(),
                    });
                }
            }
            drop(shared);
            // Many processors lose a worker at once; they should not all come back at once.
            time::sleep(wait.mul_f64(random.random_range(0.5..1.5))).await;
            wait = (wait * 2).min(BACK_OFF_MOST);
        }
    }

    /// Dials, says Hello and reads the answer.
    async fn greet(&self) -> Result<(Arc<Link>, Inbound), Ended> {
        let Io { reader, writer } = self.config.dial.dial(&self.address).await?;
        let mut inbound = Inbound::new(reader);
        let mut out = Outbound::new(writer);
        let hello = plane::Hello {
            software: SOFTWARE.to_owned(),
            token: self.config.token.clone().unwrap_or_default().into_bytes(),
            worker: self
                .config
                .worker
                .clone()
                .map(|id| id.0)
                .unwrap_or_default(),
        };
        frame::put_hello(&mut out.buf, &hello);
        poll_fn(|cx| out.poll_flush(cx)).await?;
        let header = inbound.first::<Ended>().await?;
        let payload = frame::take(&mut inbound.buf, header);
        let peer = frame::introduction(&payload)?;
        if peer.major != frame::MAJOR {
            return Err(Ended::Refused {
                code: Code::Incompatible,
                message: format!(
                    "the processor speaks plane version {}.{}, the worker {}.{}: the first numbers must be equal",
                    frame::MAJOR,
                    frame::MINOR,
                    peer.major,
                    peer.minor
                ),
            });
        }
        match header.kind {
            Some(Kind::Welcome) => {
                let welcome: plane::Welcome = frame::message(Kind::Welcome, peer.message)?;
                info!(worker = %self.address, id = welcome.worker, software = welcome.software, "connected");
                let unclaimed = Arc::clone(&self.config.unclaimed);
                Ok((Arc::new(Link::new(out, unclaimed)), inbound))
            }
            Some(Kind::Reject) => {
                let error: Error = frame::message(Kind::Reject, peer.message)?;
                Err(Ended::Refused {
                    code: error.code().into(),
                    message: error.message,
                })
            }
            _ => Err(FrameError::NotStator.into()),
        }
    }

    /// Offers the link to the client and reads until the connection ends.
    async fn serve(&self, link: &Arc<Link>, inbound: Inbound) -> Ended {
        {
            let Some(shared) = self.shared.upgrade() else {
                return Ended::Unused;
            };
            *shared.link.lock() = Some(link.clone());
            shared.state.send_replace(State::Ready);
        }
        // Ends the streams also when the task itself is ended.
        let _end = EndOnDrop {
            link,
            shared: &self.shared,
            address: &self.address,
            reason: Mutex::new("the client was closed".to_owned()),
        };
        let ended = self.read(link, inbound).await;
        *_end.reason.lock() = ended.to_string();
        ended
    }

    async fn read(&self, link: &Link, mut inbound: Inbound) -> Ended {
        let mut beat = time::interval(self.config.ping_every);
        beat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut beats = 0;
        loop {
            if let Err(ended) = self.handle(link, &mut inbound.buf) {
                return ended;
            }
            tokio::select! {
                biased;
                error = poll_fn(|cx| link.poll_drive(cx)) => return error.into(),
                _ = beat.tick() => {
                    if let Err(lost) = inbound.check(self.config.dead_after) {
                        return lost.into();
                    }
                    beats += 1;
                    let mut out = link.out.lock();
                    frame::put_beat(&mut out.buf, Kind::Ping, beats);
                    out.flush();
                }
                read = inbound.read() => if let Err(lost) = read {
                    return lost.into();
                },
            }
        }
    }

    /// Handles every frame that has arrived in full.
    fn handle(&self, link: &Link, buf: &mut BytesMut) -> Result<(), Ended> {
        while let Some(header) = frame::peek(buf, frame::MAX_FRAME)? {
            let payload = frame::payload(buf, header);
            match header.kind {
                Some(Kind::Step) => {
                    let step: StepDeltas = frame::message(Kind::Step, payload)?;
                    if let Some(load) = step.load {
                        self.with(|shared| *shared.load.lock() = load);
                    }
                    link.step(step);
                }
                Some(Kind::Pong) => {
                    frame::beat(Kind::Pong, payload)?;
                }
                Some(Kind::Draining) => {
                    info!(worker = %self.address, "the worker is draining");
                    self.with(|shared| drop(shared.state.send_replace(State::Draining)));
                }
                Some(Kind::Blob) => link.blob(payload)?,
                Some(
                    kind @ (Kind::Hello
                    | Kind::Welcome
                    | Kind::Reject
                    | Kind::Submit
                    | Kind::Cancel
                    | Kind::Ping
                    | Kind::BlobRequest),
                ) => return Err(FrameError::Unexpected { kind }.into()),
                None => debug!(worker = %self.address, "skipped a frame of an unknown kind"),
            }
            frame::skip(buf, header);
        }
        Ok(())
    }

    fn with(&self, f: impl FnOnce(&Shared)) {
        if let Some(shared) = self.shared.upgrade() {
            f(&shared);
        }
    }
}

/// Ends all streams of a link, whatever ends its task.
struct EndOnDrop<'a> {
    link: &'a Arc<Link>,
    shared: &'a Weak<Shared>,
    address: &'a str,
    reason: Mutex<String>,
}

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            *shared.link.lock() = None;
        }
        self.link.end(&PlaneError::Disconnected {
            address: self.address.to_owned(),
            reason: std::mem::take(&mut self.reason.lock()),
        });
    }
}
