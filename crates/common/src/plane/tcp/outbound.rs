//! The way out of a socket without a task in between.
//!
//! Whoever has a frame writes it to the socket itself, under a short lock, if nothing is in front
//! of it. Only what the socket does not take at once is left to the connection's own task, whose waker
//! every write attempt carries. So in the normal case an engine step costs one system call and no
//! task switch.

use std::{
    io,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BytesMut};

use crate::plane::net::Writer;

/// The buffer goes back to the allocator if it grew beyond this (a prompt of 256 Ki tokens) and
/// is empty again.
const KEEP_CAPACITY: usize = 1 << 20;

/// Frames on their way to the socket.
pub(super) struct Outbound {
    /// Absent: closed, and what is written goes nowhere.
    writer: Option<Writer>,
    /// Encoded frames; the front may be half written.
    pub(super) buf: BytesMut,
    waker: Waker,
    failed: Option<io::Error>,
    /// The buffer grew beyond what is kept.
    oversized: bool,
}

impl Outbound {
    pub(super) fn new(writer: Writer) -> Self {
        Self {
            writer: Some(writer),
            buf: BytesMut::with_capacity(16 << 10),
            waker: Waker::noop().clone(),
            failed: None,
            oversized: false,
        }
    }

    /// Says whether nothing waits for the socket.
    pub(super) fn is_idle(&self) -> bool {
        self.buf.is_empty() && self.failed.is_none()
    }

    /// Writes as much as the socket takes now. A failure is kept for the connection's task, which
    /// is woken; a caller need not look at it.
    pub(super) fn flush(&mut self) {
        let waker = self.waker.clone();
        let _ = self.write(&mut Context::from_waker(&waker));
        if self.failed.is_some() {
            self.waker.wake_by_ref();
        }
    }

    /// Wakes the connection's task.
    pub(super) fn wake(&self) {
        self.waker.wake_by_ref();
    }

    /// Writes until the buffer is empty. For the connection's task, which is woken from now on
    /// whenever somebody's write did not get through.
    ///
    /// # Errors
    /// The socket's; the connection is over.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.waker.will_wake(cx.waker()) {
            self.waker = cx.waker().clone();
        }
        let done = self.write(cx);
        match self.failed.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => done.map(Ok),
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(writer) = &mut self.writer else {
            self.buf.clear();
            return Poll::Ready(());
        };
        self.oversized |= self.buf.len() > KEEP_CAPACITY;
        while !self.buf.is_empty() && self.failed.is_none() {
            match writer.as_mut().poll_write(cx, &self.buf) {
                Poll::Ready(Ok(0)) => self.failed = Some(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(written)) => self.buf.advance(written),
                Poll::Ready(Err(error)) => self.failed = Some(error),
                Poll::Pending => return Poll::Pending,
            }
        }
        if self.buf.is_empty() && self.oversized {
            self.buf = BytesMut::new();
            self.oversized = false;
        }
        // A buffered writer (TLS) holds bytes back until it is flushed; for TCP this is free.
        if self.failed.is_none() {
            match writer.as_mut().poll_flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => self.failed = Some(error),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }

    /// Ends the way out, after what was written.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.writer {
            Some(writer) => writer.as_mut().poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Lets go of the socket, whoever still holds this.
    pub(super) fn close(&mut self) {
        self.writer = None;
        self.buf = BytesMut::new();
    }
}
