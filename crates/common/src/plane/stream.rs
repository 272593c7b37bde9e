//! The deltas of one request, at the processor.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use futures::{Stream, future::poll_fn};
use parking_lot::Mutex;

use super::{
    client::{Client, Link},
    delta,
};
use crate::{Code, proto::worker::Delta};

/// Bytes that may wait for one reader before its stream is ended: far more than the output of any
/// request whose client reads at all.
pub(super) const MAX_WAITING: usize = 16 << 20;

/// What has arrived for one stream and was not yet read: at most one delta, into which later ones merge.
#[derive(Default)]
pub(super) struct Slot {
    state: Mutex<SlotState>,
    /// Where the bytes are counted that wait in several slots.
    total: Option<Arc<AtomicUsize>>,
}

#[derive(Default)]
struct SlotState {
    waiting: Option<Delta>,
    /// About how many bytes wait, not counting the first delta.
    weight: usize,
    waker: Option<Waker>,
}

/// Whether a stream goes on after a delta was put into its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Open,
    /// That was the last delta.
    Finished,
    /// The reader is too far behind; the stream was ended and must be cancelled at the worker.
    Overflowed,
}

impl Slot {
    /// Returns a slot whose bytes count in `total` as well.
    pub(super) fn counted(total: Arc<AtomicUsize>) -> Self {
        Self {
            state: Mutex::default(),
            total: Some(total),
        }
    }

    /// Leaves a delta for the reader. Never blocks.
    pub(super) fn put(&self, delta: Delta) -> After {
        let mut after = if delta::is_last(&delta) {
            After::Finished
        } else {
            After::Open
        };
        let mut state = self.state.lock();
        match &mut state.waiting {
            None => {
                // The common case of a reader that keeps up: nothing to add up.
                state.waiting = Some(delta);
            }
            Some(waiting) => {
                let stream = delta.stream;
                let more = delta::weight(&delta);
                delta::merge(waiting, delta);
                state.weight += more;
                if let Some(total) = &self.total {
                    total.fetch_add(more, Ordering::Relaxed);
                }
                if state.weight > MAX_WAITING && after == After::Open {
                    state.waiting = Some(delta::failed(
                        stream,
                        Code::Overloaded,
                        format!(
                            "the reader of this stream is more than {MAX_WAITING} bytes behind"
                        ),
                    ));
                    after = After::Overflowed;
                }
            }
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        after
    }

    /// Takes what waits, for a stream that has no reader any more.
    pub(super) fn take(&self) -> Option<Delta> {
        self.empty(&mut self.state.lock())
    }

    /// Takes what waits if it is a refusal: the error of a request that nothing has come of.
    pub(super) fn take_refusal(&self) -> Option<Delta> {
        let mut state = self.state.lock();
        let is_refusal = |delta: &Delta| delta.error.is_some() && delta.tokens.is_empty();
        if !state.waiting.as_ref().is_some_and(is_refusal) {
            return None;
        }
        self.empty(&mut state)
    }

    /// Says whether something lies in it.
    #[cfg(test)]
    pub(super) fn is_waiting(&self) -> bool {
        self.state.lock().waiting.is_some()
    }

    fn empty(&self, state: &mut SlotState) -> Option<Delta> {
        let weight = std::mem::take(&mut state.weight);
        if let Some(total) = &self.total {
            total.fetch_sub(weight, Ordering::Relaxed);
        }
        state.waiting.take()
    }

    /// Takes what waits as soon as there is something.
    pub(super) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Delta> {
        let mut state = self.state.lock();
        if let Some(delta) = self.empty(&mut state) {
            return Poll::Ready(delta);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

/// The outputs of one request. Dropping it before its last delta cancels the request at the worker.
pub struct DeltaStream {
    /// Keeps the connection open, also when nobody else has the client any more: a worker that drains is
    /// forgotten while it finishes what runs.
    _client: Client,
    link: Arc<dyn Link>,
    slot: Arc<Slot>,
    stream: u32,
    finished: bool,
}

impl DeltaStream {
    pub(super) fn new(client: Client, link: Arc<dyn Link>, slot: Arc<Slot>, stream: u32) -> Self {
        Self {
            _client: client,
            link,
            slot,
            stream,
            finished: false,
        }
    }

    /// Returns the next delta: everything that has arrived since the last call, merged. The last one has
    /// `finish` set; after it comes none. A lost connection is a last delta with the error
    /// [`Code::Disconnected`]. Cancel safe.
    pub async fn next(&mut self) -> Option<Delta> {
        poll_fn(|cx| self.poll_delta(cx)).await
    }

    fn poll_delta(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let delta = std::task::ready!(self.slot.poll_take(cx));
        self.finished = delta::is_last(&delta);
        Poll::Ready(Some(delta))
    }
}

impl Stream for DeltaStream {
    type Item = Delta;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        self.poll_delta(cx)
    }
}

impl Drop for DeltaStream {
    fn drop(&mut self) {
        if !self.finished {
            self.link.cancel(self.stream, &self.slot);
        }
    }
}
