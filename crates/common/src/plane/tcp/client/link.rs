//! One connection to a worker, as those see it who have requests for it.

use std::{
    io,
    sync::Arc,
    task::{Context, Poll},
};

use ahash::AHashMap;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Shared, Unclaimed};
use crate::{
    ids::BlobHash,
    plane::tcp::{
        PlaneError, delta,
        frame::{self, BlobPart, FrameError},
        outbound::Outbound,
        stream::{After, Slot},
    },
    proto::worker::{Delta, GenerateRequest, StepDeltas},
};

/// The largest blob that is taken: tokenizers reach 40 MiB.
const MAX_BLOB: usize = 256 << 20;

/// One connection, from Welcome to its end.
pub(in crate::plane::tcp) struct Link {
    pub(super) out: Mutex<Outbound>,
    streams: Mutex<Streams>,
    blobs: Mutex<Blobs>,
    unclaimed: Unclaimed,
}

#[derive(Default)]
struct Streams {
    open: AHashMap<u32, Arc<Slot>>,
    last: u32,
    /// The connection is over, and why.
    ended: Option<PlaneError>,
}

#[derive(Default)]
struct Blobs {
    waiting: AHashMap<u32, BlobWait>,
    next: u32,
}

struct BlobWait {
    bytes: BytesMut,
    done: oneshot::Sender<Option<Bytes>>,
}

impl Streams {
    fn add(&mut self, slot: &Arc<Slot>) -> Result<u32, PlaneError> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        // After four billion requests numbers start again; one that still runs keeps its own.
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.open.contains_key(&self.last) {
                break;
            }
        }
        self.open.insert(self.last, slot.clone());
        Ok(self.last)
    }
}

impl Link {
    pub(super) fn new(out: Outbound, unclaimed: Unclaimed) -> Self {
        Self {
            unclaimed,
            out: Mutex::new(out),
            streams: Mutex::default(),
            blobs: Mutex::default(),
        }
    }

    /// Returns how many streams are open.
    pub(super) fn in_flight(&self) -> usize {
        self.streams.lock().open.len()
    }

    /// Writes a request of `size` encoded bytes, and opens its stream.
    pub(super) fn submit(
        &self,
        request: &GenerateRequest,
        size: usize,
        shared: &Shared,
    ) -> Result<(Arc<Slot>, u32), PlaneError> {
        let slot = Arc::new(Slot::default());
        // Numbers rise on the wire, so the number is given under the lock of the way out.
        let mut out = self.out.lock();
        if out.buf.len() + size > shared.max_backlog {
            return Err(PlaneError::Backlog {
                address: shared.address.clone(),
                queued: out.buf.len(),
                limit: shared.max_backlog,
            });
        }
        let stream = self.streams.lock().add(&slot)?;
        frame::put_submit(&mut out.buf, stream, request);
        out.flush();
        Ok((slot, stream))
    }

    /// Asks for a blob. The answer is dropped if the connection ends before it has come.
    pub(super) fn ask_blob(&self, hash: &BlobHash) -> oneshot::Receiver<Option<Bytes>> {
        let (done, answer) = oneshot::channel();
        // In this order, so that the end of the connection does not fall in between.
        let streams = self.streams.lock();
        if streams.ended.is_some() {
            return answer;
        }
        let number = {
            let mut blobs = self.blobs.lock();
            let number = blobs.next;
            blobs.next = number.wrapping_add(1);
            let bytes = BytesMut::new();
            blobs.waiting.insert(number, BlobWait { bytes, done });
            number
        };
        drop(streams);
        let mut out = self.out.lock();
        frame::put_blob_request(&mut out.buf, number, hash);
        out.flush();
        answer
    }

    /// Tells the worker that nobody reads a stream any more, unless it has ended.
    ///
    /// - `slot`: the stream's; what lies in it is nobody's any more.
    pub(in crate::plane::tcp) fn cancel(&self, stream: u32, slot: &Slot) {
        if self.streams.lock().open.remove(&stream).is_some() {
            self.put_cancel(stream);
        }
        // From here on nothing is put into the slot.
        if let Some(delta) = slot.take() {
            self.unread(delta);
        }
    }

    /// Hands on what must not be lost of a delta that nobody reads.
    fn unread(&self, delta: Delta) {
        if !delta.kv_transfer_params.is_empty() {
            (self.unclaimed)(delta);
        }
    }

    fn put_cancel(&self, stream: u32) {
        let mut out = self.out.lock();
        frame::put_cancel(&mut out.buf, stream);
        out.flush();
    }

    /// Ends every stream.
    pub(super) fn end(&self, error: &PlaneError) {
        self.out.lock().close();
        let open = {
            let mut streams = self.streams.lock();
            streams.ended = Some(error.clone());
            std::mem::take(&mut streams.open)
        };
        self.blobs.lock().waiting.clear();
        for (stream, slot) in open {
            slot.put(delta::failed(stream, error.code(), error.to_string()));
        }
    }

    /// Distributes the deltas of a step.
    pub(super) fn step(&self, step: StepDeltas) {
        let mut overflowed = Vec::new();
        let mut unread = Vec::new();
        {
            let mut streams = self.streams.lock();
            for delta in step.deltas {
                let stream = delta.stream;
                // Absent: cancelled a moment ago.
                let Some(slot) = streams.open.get(&stream) else {
                    unread.push(delta);
                    continue;
                };
                match slot.put(delta) {
                    After::Open => {}
                    After::Finished => drop(streams.open.remove(&stream)),
                    After::Overflowed => {
                        streams.open.remove(&stream);
                        overflowed.push(stream);
                    }
                }
            }
        }
        for stream in overflowed {
            self.put_cancel(stream);
        }
        for delta in unread {
            self.unread(delta);
        }
    }

    /// Takes a piece of a blob.
    pub(super) fn blob(&self, payload: &[u8]) -> Result<(), FrameError> {
        let chunk = frame::blob(payload)?;
        let mut blobs = self.blobs.lock();
        // Absent: the caller has gone.
        let Some(wait) = blobs.waiting.get_mut(&chunk.number) else {
            return Ok(());
        };
        if wait.bytes.len() + chunk.bytes.len() > MAX_BLOB {
            return Err(FrameError::TooLarge {
                size: wait.bytes.len() + chunk.bytes.len(),
                limit: MAX_BLOB,
            });
        }
        wait.bytes.extend_from_slice(chunk.bytes);
        if chunk.part != BlobPart::More
            && let Some(wait) = blobs.waiting.remove(&chunk.number)
        {
            let blob = (chunk.part == BlobPart::Last).then(|| wait.bytes.freeze());
            // A caller that has gone needs no answer.
            let _ = wait.done.send(blob);
        }
        Ok(())
    }

    /// Writes what others could not, until the connection fails.
    pub(super) fn poll_drive(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self.out.lock().poll_flush(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(error),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    }
}
