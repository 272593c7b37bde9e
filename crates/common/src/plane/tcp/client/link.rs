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

use crate::{
    ids::BlobHash,
    plane::{
        PlaneError,
        client::{self, MAX_BLOB, Streams, Unclaimed},
        stream::Slot,
        tcp::{
            frame::{self, BlobPart, FrameError},
            outbound::Outbound,
        },
    },
    proto::worker::{GenerateRequest, StepDeltas},
};

/// One connection, from Welcome to its end.
pub(super) struct Link {
    /// Where the worker is, for errors.
    address: String,
    max_backlog: usize,
    pub(super) out: Mutex<Outbound>,
    streams: Streams,
    blobs: Mutex<Blobs>,
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

impl client::Link for Link {
    fn in_flight(&self) -> usize {
        self.streams.len()
    }

    fn submit(
        &self,
        request: &GenerateRequest,
        size: usize,
    ) -> Result<(Arc<Slot>, u32), PlaneError> {
        let slot = Arc::new(Slot::default());
        // Numbers rise on the wire, so the number is given under the lock of the way out.
        let mut out = self.out.lock();
        if out.buf.len() + size > self.max_backlog {
            return Err(PlaneError::Backlog {
                address: self.address.clone(),
                queued: out.buf.len(),
                limit: self.max_backlog,
            });
        }
        let stream = self.streams.open(&slot)?;
        frame::put_submit(&mut out.buf, stream, request);
        out.flush();
        Ok((slot, stream))
    }

    fn cancel(&self, stream: u32, slot: &Slot) {
        if self.streams.forget(stream) {
            self.put_cancel(stream);
        }
        if let Some(delta) = slot.take() {
            self.streams.unread(delta);
        }
    }

    fn ask_blob(&self, hash: &BlobHash) -> oneshot::Receiver<Option<Bytes>> {
        let (done, answer) = oneshot::channel();
        let mut number = 0;
        // In this order, so that the end of the connection does not fall in between.
        let asked = self.streams.unless_ended(|| {
            let mut blobs = self.blobs.lock();
            number = blobs.next;
            blobs.next = number.wrapping_add(1);
            let bytes = BytesMut::new();
            blobs.waiting.insert(number, BlobWait { bytes, done });
        });
        if asked {
            let mut out = self.out.lock();
            frame::put_blob_request(&mut out.buf, number, hash);
            out.flush();
        }
        answer
    }

    fn end(&self, error: &PlaneError) {
        self.out.lock().close();
        self.streams.end(error);
        self.blobs.lock().waiting.clear();
    }
}

impl Link {
    pub(super) fn new(
        address: String,
        max_backlog: usize,
        out: Outbound,
        unclaimed: Unclaimed,
    ) -> Self {
        Self {
            address,
            max_backlog,
            out: Mutex::new(out),
            streams: Streams::new(unclaimed),
            blobs: Mutex::default(),
        }
    }

    fn put_cancel(&self, stream: u32) {
        let mut out = self.out.lock();
        frame::put_cancel(&mut out.buf, stream);
        out.flush();
    }

    /// Distributes the deltas of a step.
    pub(super) fn step(&self, step: StepDeltas) {
        for stream in self.streams.distribute(step.deltas) {
            self.put_cancel(stream);
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
