//! The two ends of a pipe that its owner has: one to read from, one to write to.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker, ready},
};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{super::wire::HEADER, LARGEST, MESSAGE, Pipe, WINDOW, outbox::Kind};

/// The way in.
pub(in super::super) struct ReadHalf(pub(super) Arc<Pipe>);

/// The way out. Dropping it closes the pipe.
pub(in super::super) struct WriteHalf {
    pub(super) pipe: Arc<Pipe>,
    /// Until all is with the server.
    pub(super) flush: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send>>>,
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let pipe = &*self.0;
        pipe.halves.reader.register(cx.waker());
        let mut inbox = pipe.inbox.lock();
        pipe.take_in(&mut inbox);
        let inbox = &mut *inbox;
        let before = buf.filled().len();
        let mut read = 0;
        while buf.remaining() > 0
            && let Some(front) = inbox.waiting.front_mut()
        {
            let taken = front.len().min(buf.remaining());
            buf.put_slice(&front[..taken]);
            front.advance(taken);
            inbox.begun += taken as u64;
            if front.is_empty() {
                read += std::mem::take(&mut inbox.begun) + MESSAGE;
                inbox.waiting.pop_front();
            }
        }
        inbox.held -= read;
        let read = pipe.read.fetch_add(read, Ordering::Relaxed) + read;
        // The lock of the inbox is held, so that nobody else tells it meanwhile.
        let mut outbox = pipe.outbox.lock();
        if read - outbox.told >= u64::from(WINDOW) / 2 {
            // If it does not leave now, both halves are woken when it can, and the first to come tells it.
            let mut cx = Context::from_waker(&pipe.waker);
            if let Poll::Ready(sent) = outbox.poll_send(&mut cx, &pipe.read, Kind::Read) {
                sent?;
            }
        }
        if buf.filled().len() > before || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        match &inbox.broken {
            _ if inbox.closed => Poll::Ready(Ok(())),
            Some(broken) => Poll::Ready(Err(broken.clone().into())),
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for WriteHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let pipe = &*self.pipe;
        pipe.halves.writer.register(cx.waker());
        let mut outbox = pipe.outbox.lock();
        if outbox.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut room = pipe.room(&outbox);
        if room == 0 {
            // In the order of the reader: the inbox first.
            drop(outbox);
            let mut inbox = pipe.inbox.lock();
            pipe.take_in(&mut inbox);
            if let Some(broken) = &inbox.broken {
                return Poll::Ready(Err(broken.clone().into()));
            }
            drop(inbox);
            outbox = pipe.outbox.lock();
            room = pipe.room(&outbox);
            if room == 0 {
                return Poll::Pending;
            }
        }
        let allowed = outbox.client.max_payload().saturating_sub(HEADER);
        let largest = LARGEST
            .min(allowed)
            .min(usize::try_from(room).unwrap_or(LARGEST));
        let data = &data[..data.len().min(largest)];
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut cx = Context::from_waker(&pipe.waker);
        ready!(outbox.poll_send(&mut cx, &pipe.read, Kind::Data(data)))?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The library writes to its socket by itself.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let flush = match &mut this.flush {
            Some(flush) => flush,
            None => {
                this.pipe.halves.writer.register(cx.waker());
                let mut outbox = this.pipe.outbox.lock();
                if !outbox.closed {
                    let mut cx = Context::from_waker(&this.pipe.waker);
                    ready!(outbox.poll_send(&mut cx, &this.pipe.read, Kind::Close))?;
                }
                let client = outbox.client.clone();
                // A process that ends now would take with it what the library has not written yet.
                let flush = async move { client.flush().await.map_err(io::Error::other) };
                this.flush.insert(Box::pin(flush))
            }
        };
        flush.as_mut().poll(cx)
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        let mut outbox = self.pipe.outbox.lock();
        if !outbox.closed {
            // If it does not leave, the peer finds nobody here when it asks.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = outbox.poll_send(&mut cx, &self.pipe.read, Kind::Close);
        }
    }
}
