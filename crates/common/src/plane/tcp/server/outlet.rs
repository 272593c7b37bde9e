//! The way out of one connection: frames if the socket is free, else deltas that merge.

use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll},
};

use ahash::AHashMap;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    Code,
    plane::{
        delta, server,
        tcp::{
            frame::{self, BlobChunk, BlobPart, Kind},
            outbound::Outbound,
        },
    },
    proto::worker::{Delta, Load, StepDeltas},
};

/// A frame of deltas is closed when it is this large, so that a backlog is not sent in one piece.
const STEP_BYTES: usize = 4 << 20;

/// Blobs that one peer may have asked for and not yet received.
pub(super) const MAX_BLOBS: usize = 64;

/// The way out of one connection.
pub(super) struct Outlet {
    /// For logs.
    peer: String,
    state: Mutex<Sending>,
    pub(super) closed: CancellationToken,
    max_backlog: usize,
}

/// What waits to be sent. Order: encoded frames, then merged deltas, then blobs.
pub(super) struct Sending {
    pub(super) out: Outbound,
    /// Deltas that came while the socket was busy, one per stream; `index` says where.
    waiting: Vec<Delta>,
    index: AHashMap<u32, usize>,
    /// About how many bytes they hold.
    weight: usize,
    load: Option<Load>,
    /// The number of the latest Ping, until it is answered.
    pub(super) pong: Option<u64>,
    blobs: VecDeque<BlobAnswer>,
}

struct BlobAnswer {
    number: u32,
    /// Absent: there is no such blob.
    rest: Option<Bytes>,
}

impl server::Outlet for Outlet {
    fn send(&self, deltas: &mut Vec<Delta>, load: Option<Load>) {
        let mut sending = self.state.lock();
        if sending.is_idle() {
            let mut step = StepDeltas {
                deltas: std::mem::take(deltas),
                load,
            };
            // Only prompt log-probabilities make a step that does not fit into one frame.
            if step.deltas.iter().map(delta::weight).sum::<usize>() <= STEP_BYTES {
                frame::put_step(&mut sending.out.buf, &step);
                sending.out.flush();
                step.deltas.clear();
                *deltas = step.deltas;
                return;
            }
            *deltas = step.deltas;
        }
        for delta in deltas.drain(..) {
            sending.merge(delta);
        }
        if load.is_some() {
            sending.load = load;
        }
        if sending.weight > self.max_backlog {
            warn!(peer = %self.peer, bytes = sending.weight, "the processor takes no outputs: closing its connection");
            self.closed.cancel();
            return;
        }
        sending.flush();
    }

    #[cfg(test)]
    fn waiting_streams(&self) -> usize {
        self.state.lock().waiting.len()
    }
}

impl Outlet {
    pub(super) fn new(peer: String, out: Outbound, max_backlog: usize) -> Self {
        Self {
            peer,
            state: Mutex::new(Sending {
                out,
                waiting: Vec::new(),
                index: AHashMap::new(),
                weight: 0,
                load: None,
                pong: None,
                blobs: VecDeque::new(),
            }),
            closed: CancellationToken::new(),
            max_backlog,
        }
    }

    /// Takes a blob that the peer asked for; absent: there is none. Says whether there was room. Sent by the
    /// connection's task.
    pub(super) fn answer_blob(&self, number: u32, rest: Option<Bytes>) -> bool {
        let mut sending = self.state.lock();
        let room = sending.blobs.len() < MAX_BLOBS;
        if room {
            sending.blobs.push_back(BlobAnswer { number, rest });
        }
        room
    }

    /// Lets go of the socket, whoever still holds this.
    pub(super) fn release(&self) {
        self.closed.cancel();
        self.state.lock().out.close();
    }

    /// Sends frames of the connection itself.
    pub(super) fn control(&self, put: impl FnOnce(&mut Sending)) {
        let mut sending = self.state.lock();
        put(&mut sending);
        sending.flush();
    }

    /// Drives what others could not write, until the connection fails. For the connection's task.
    pub(super) fn poll_drive(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            // Let go between frames, so that a long blob does not hold up a step.
            let mut sending = self.state.lock();
            match sending.out.poll_flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
            if !sending.refill() {
                return Poll::Pending;
            }
        }
    }

    /// Waits until everything that was sent is with the operating system.
    pub(super) fn poll_drained(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.poll_drive(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let mut sending = self.state.lock();
                if sending.is_idle() {
                    sending.out.poll_shutdown(cx)
                } else {
                    Poll::Pending
                }
            }
        }
    }
}

impl Sending {
    fn is_idle(&self) -> bool {
        self.out.is_idle()
            && self.waiting.is_empty()
            && self.load.is_none()
            && self.pong.is_none()
            && self.blobs.is_empty()
    }

    fn merge(&mut self, delta: Delta) {
        self.weight += delta::weight(&delta);
        match self.index.get(&delta.stream) {
            Some(&at) => delta::merge(&mut self.waiting[at], delta),
            None => {
                self.index.insert(delta.stream, self.waiting.len());
                self.waiting.push(delta);
            }
        }
    }

    fn flush(&mut self) {
        self.out.flush();
        if self.out.is_idle() && self.refill() {
            self.out.flush();
        }
        if self.out.is_idle() && !self.is_idle() {
            // The rest is for the connection's task.
            self.out.wake();
        }
    }

    /// Encodes what waits next. Says whether there was anything. The encoded part must have been
    /// written.
    fn refill(&mut self) -> bool {
        let buf = &mut self.out.buf;
        if let Some(number) = self.pong.take() {
            frame::put_beat(buf, Kind::Pong, number);
        }
        if !self.waiting.is_empty() || self.load.is_some() {
            let mut bytes = 0;
            let fits = self
                .waiting
                .iter()
                .take_while(|delta| {
                    let first = bytes == 0;
                    bytes += delta::weight(delta);
                    first || bytes <= STEP_BYTES
                })
                .count();
            let rest = self.waiting.split_off(fits);
            let mut step = StepDeltas {
                deltas: std::mem::replace(&mut self.waiting, rest),
                load: self.load.take(),
            };
            for delta in &mut step.deltas {
                if prost::Message::encoded_len(delta) > frame::MAX_FRAME - STEP_BYTES {
                    *delta = delta::failed(
                        delta.stream,
                        Code::TooLarge,
                        "the output of one step is larger than a frame may be",
                    );
                }
            }
            frame::put_step(buf, &step);
            self.index.clear();
            self.index.extend(
                self.waiting
                    .iter()
                    .enumerate()
                    .map(|(at, d)| (d.stream, at)),
            );
            self.weight = self.waiting.iter().map(delta::weight).sum();
            return true;
        }
        if let Some(answer) = self.blobs.front_mut() {
            let number = answer.number;
            let (part, bytes) = match &mut answer.rest {
                None => (BlobPart::Missing, Bytes::new()),
                Some(rest) => {
                    let chunk = rest.split_to(rest.len().min(frame::BLOB_CHUNK));
                    let part = if rest.is_empty() {
                        BlobPart::Last
                    } else {
                        BlobPart::More
                    };
                    (part, chunk)
                }
            };
            frame::put_blob(
                buf,
                &BlobChunk {
                    number,
                    part,
                    bytes: &bytes,
                },
            );
            if part != BlobPart::More {
                self.blobs.pop_front();
            }
            return true;
        }
        !self.out.buf.is_empty()
    }
}
