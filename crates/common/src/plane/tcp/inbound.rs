//! The way in of a socket: bytes until frames are whole, and when the peer was last heard of.
//!
//! What a frame means is the business of the two ends.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{io::AsyncReadExt, time::Instant};

use super::frame::{self, FrameError, Header};
use crate::plane::net::Reader;

/// Free room that a read finds in the buffer: about two steps of 1,024 streams.
const READ_ROOM: usize = 64 << 10;

/// Why nothing more comes in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("closed by the peer")]
    ByPeer,
    #[error("not heard of for {} s", .0.as_secs())]
    Dead(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Frames on their way from the socket.
pub(super) struct Inbound {
    reader: Reader,
    /// What arrived; the back may be half a frame.
    pub(super) buf: BytesMut,
    heard: Instant,
}

impl Inbound {
    pub(super) fn new(reader: Reader) -> Self {
        Self {
            reader,
            buf: BytesMut::with_capacity(READ_ROOM),
            heard: Instant::now(),
        }
    }

    /// Waits for the frame that a stranger begins with. It stays at the front of the buffer.
    pub(super) async fn first<E>(&mut self) -> Result<Header, E>
    where
        E: From<Lost> + From<FrameError>,
    {
        loop {
            if let Some(header) = frame::peek(&self.buf, frame::MAX_HELLO)? {
                return Ok(header);
            }
            self.read().await?;
        }
    }

    /// Waits for more bytes. Cancel safe.
    pub(super) async fn read(&mut self) -> Result<(), Lost> {
        self.buf.reserve(READ_ROOM);
        if self.reader.read_buf(&mut self.buf).await? == 0 {
            return Err(Lost::ByPeer);
        }
        self.heard = Instant::now();
        Ok(())
    }

    /// Fails if the peer was not heard of for this long.
    pub(super) fn check(&self, dead_after: Duration) -> Result<(), Lost> {
        if self.heard.elapsed() > dead_after {
            return Err(Lost::Dead(dead_after));
        }
        Ok(())
    }
}
