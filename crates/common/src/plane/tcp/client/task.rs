//! Greets a worker and reads what it sends.

use std::{io, sync::Arc};

use async_trait::async_trait;
use bytes::BytesMut;
use futures::future::poll_fn;
use tokio::time;
use tracing::{debug, info};

use super::link::Link;
use crate::{
    Code,
    plane::{
        SOFTWARE,
        client::{self, ClientConfig, Ended, Reach, Told},
        net::{Dial, Io},
        tcp::{
            frame::{self, FrameError, Kind},
            inbound::{Inbound, Lost},
            outbound::Outbound,
        },
    },
    proto::{
        plane,
        worker::{Error, StepDeltas},
    },
};

impl From<Lost> for Ended {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost.to_string())
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<FrameError> for Ended {
    fn from(error: FrameError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// The way to a worker over whatever carries bytes.
pub(in crate::plane) struct Frames {
    /// The worker's address, for logs and errors.
    pub(in crate::plane) address: String,
    /// What is dialled.
    pub(in crate::plane) place: String,
    pub(in crate::plane) dial: Arc<dyn Dial>,
    pub(in crate::plane) config: ClientConfig,
}

#[async_trait]
impl Reach for Frames {
    async fn greet(&self) -> Result<Box<dyn client::Session>, Ended> {
        let Io { reader, writer } = self.dial.dial(&self.place).await?;
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
                let link = Link::new(
                    self.address.clone(),
                    self.config.max_backlog,
                    out,
                    Arc::clone(&self.config.unclaimed),
                );
                Ok(Box::new(Session {
                    address: self.address.clone(),
                    link: Arc::new(link),
                    inbound,
                    config: self.config.clone(),
                }))
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
}

/// A connection that the worker welcomed.
struct Session {
    address: String,
    link: Arc<Link>,
    inbound: Inbound,
    config: ClientConfig,
}

#[async_trait]
impl client::Session for Session {
    fn link(&self) -> Arc<dyn client::Link> {
        self.link.clone()
    }

    async fn read(mut self: Box<Self>, told: &Told) -> Ended {
        let Self {
            address,
            link,
            inbound,
            config,
        } = &mut *self;
        let mut beat = time::interval(config.ping_every);
        beat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut beats = 0;
        loop {
            if let Err(ended) = handle(link, told, address, &mut inbound.buf) {
                return ended;
            }
            tokio::select! {
                biased;
                error = poll_fn(|cx| link.poll_drive(cx)) => return error.into(),
                _ = beat.tick() => {
                    if let Err(lost) = inbound.check(config.dead_after) {
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
}

/// Handles every frame that has arrived in full.
fn handle(link: &Link, told: &Told, address: &str, buf: &mut BytesMut) -> Result<(), Ended> {
    while let Some(header) = frame::peek(buf, frame::MAX_FRAME)? {
        let payload = frame::payload(buf, header);
        match header.kind {
            Some(Kind::Step) => {
                let step: StepDeltas = frame::message(Kind::Step, payload)?;
                if let Some(load) = step.load {
                    told.load(load);
                }
                link.step(step);
            }
            Some(Kind::Pong) => {
                frame::beat(Kind::Pong, payload)?;
            }
            Some(Kind::Draining) => told.draining(),
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
            None => debug!(worker = %address, "skipped a frame of an unknown kind"),
        }
        frame::skip(buf, header);
    }
    Ok(())
}
