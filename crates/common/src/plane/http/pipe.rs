//! A byte stream of [`net`](crate::plane::net) as HTTP/2 wants it.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Semaphore,
    time::{Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::plane::net::{Io, Reader, Writer};

/// Both ways of a connection in one, which can be cut.
pub(super) struct Pipe {
    reader: Reader,
    writer: Writer,
    peer: Peer,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until the first byte: when that is too late.
    silent: Option<Pin<Box<Sleep>>>,
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// For logs.
    pub(super) name: String,
    /// How many more calls that ask for no token may be open on this connection.
    pub(super) tokenless: Arc<Semaphore>,
}

/// Calls of one connection that ask for no token and are open at once: more than one who looks after a worker needs.
pub(super) const TOKENLESS_CALLS: usize = 16;

impl Pipe {
    /// - `cut`: when cancelled, the connection fails, whatever was still to be written.
    pub(super) fn new(io: Io, peer: String, cut: CancellationToken) -> Self {
        Self {
            reader: io.reader,
            writer: io.writer,
            peer: Peer {
                name: peer,
                tokenless: Arc::new(Semaphore::new(TOKENLESS_CALLS)),
            },
            cut: Box::pin(cut.cancelled_owned()),
            silent: None,
        }
    }

    /// Lets the connection fail if nothing comes within this time.
    pub(super) fn or_silent(mut self, within: Duration) -> Self {
        self.silent = Some(Box::pin(sleep(within)));
        self
    }
}

impl Connected for Pipe {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Some(silent) = &mut self.silent
            && silent.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let read = self.reader.as_mut().poll_read(cx, buf);
        if read.is_ready() {
            self.silent = None;
        }
        read
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writer.as_mut().poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writer.as_mut().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.writer.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.as_mut().poll_shutdown(cx)
    }
}
