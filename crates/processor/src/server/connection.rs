//! One connection, from its first byte to its last, and the time it is given for what.
//!
//! hyper's own header time-out also runs while a kept-alive connection is idle and costs a timer per
//! request. Here each connection has one timer that is looked at only when it fires: [`Activity`] notes
//! what the connection is doing, and the timer asks it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::ReadBufCursor;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use stator_common::drain::Drain;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::front::Front;
use crate::App;

/// Time that a peer gets to close a connection it was asked to close.
const CLOSING: Duration = Duration::from_secs(5);
/// Streams that one HTTP/2 connection may have open; a proxy in front bundles many clients into one.
const MAX_STREAMS: u32 = 4096;

/// Opens connections.
pub(super) struct Connections {
    builder: auto::Builder<TokioExecutor>,
    app: Arc<App>,
    router: axum::Router,
    drain: Drain,
}

impl Connections {
    pub(super) fn new(app: Arc<App>, router: axum::Router, drain: Drain) -> Self {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(None);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS);
        Self {
            builder,
            app,
            router,
            drain,
        }
    }

    /// Returns the task of a connection.
    pub(super) fn open(
        &self,
        stream: TcpStream,
        tls: Option<TlsAcceptor>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let builder = self.builder.clone();
        let app = Arc::clone(&self.app);
        let router = self.router.clone();
        let drain = self.drain.clone();
        async move {
            match tls {
                None => run(stream, builder, app, router, drain).await,
                Some(tls) => match timeout(app.config.header_timeout, tls.accept(stream)).await {
                    // Boxed: a TLS session is large, and plain connections should not carry its room.
                    Ok(Ok(stream)) => Box::pin(run(stream, builder, app, router, drain)).await,
                    Ok(Err(error)) => debug!(%error, "tls handshake"),
                    Err(_) => debug!("tls handshake took too long"),
                },
            }
        }
    }
}

async fn run(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    builder: auto::Builder<TokioExecutor>,
    app: Arc<App>,
    router: axum::Router,
    drain: Drain,
) {
    let limits = Limits {
        header: app.config.header_timeout,
        idle: app.config.idle_timeout,
    };
    let activity = Arc::new(Activity::new());
    let io = Watched {
        inner: TokioIo::new(stream),
        activity: Arc::clone(&activity),
    };
    let front = Front::new(app, router, Arc::clone(&activity));
    let mut connection = std::pin::pin!(builder.serve_connection(io, front));
    let mut timer = std::pin::pin!(sleep_until(activity.epoch + limits.header));
    let mut draining = std::pin::pin!(drain.draining());
    let mut aborting = std::pin::pin!(drain.aborting());
    let mut closing = false;
    loop {
        tokio::select! {
            biased;
            ended = &mut connection => {
                if let Err(error) = ended {
                    debug!(error, "connection ended");
                }
                return;
            }
            () = &mut timer => match activity.verdict(Instant::now(), &limits) {
                Verdict::Wait(until) => timer.as_mut().reset(until),
                Verdict::Idle if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                    timer.as_mut().reset(Instant::now() + CLOSING);
                }
                Verdict::Idle | Verdict::Late => {
                    debug!("connection timed out");
                    return;
                }
            },
            () = &mut draining, if !closing => {
                closing = true;
                connection.as_mut().graceful_shutdown();
            }
            () = &mut aborting => return,
        }
    }
}

/// How long a connection may do what.
struct Limits {
    /// From the first byte of a request to the end of its header.
    header: Duration,
    /// From the end of an answer to the next request.
    idle: Duration,
}

/// What the timer decides.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing is wrong; ask again then.
    Wait(Instant),
    /// Nobody wants anything of this connection.
    Idle,
    /// A header is not coming to its end.
    Late,
}

/// What a connection is doing: written by its I/O and its requests, read by its timer.
///
/// Times are milliseconds since `epoch`, plus one, so that 0 says "not".
pub(super) struct Activity {
    epoch: Instant,
    /// Requests whose answers are not finished.
    busy: AtomicU32,
    /// When a header began to arrive; 0: none is arriving.
    header_since: AtomicU64,
    /// When the last answer ended.
    idle_since: AtomicU64,
    /// HTTP/2: bytes between requests are housekeeping, not the beginning of a header.
    multiplexed: AtomicBool,
}

impl Activity {
    fn new() -> Self {
        Self {
            epoch: Instant::now(),
            busy: AtomicU32::new(0),
            // A client that connects is expected to say something.
            header_since: AtomicU64::new(1),
            idle_since: AtomicU64::new(1),
            multiplexed: AtomicBool::new(false),
        }
    }

    /// Notes a request whose header has arrived; it ends when the returned guard is dropped.
    pub(super) fn begin(self: &Arc<Self>, multiplexed: bool) -> Busy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        self.header_since.store(0, Ordering::Relaxed);
        if multiplexed {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        Busy(Arc::clone(self))
    }

    fn read(&self) {
        if self.busy.load(Ordering::Relaxed) == 0
            && self.header_since.load(Ordering::Relaxed) == 0
            && !self.multiplexed.load(Ordering::Relaxed)
        {
            self.header_since.store(self.now(), Ordering::Relaxed);
        }
    }

    fn verdict(&self, now: Instant, limits: &Limits) -> Verdict {
        if self.busy.load(Ordering::Relaxed) > 0 {
            return Verdict::Wait(now + limits.idle.min(limits.header));
        }
        let at = |mark: u64| self.epoch + Duration::from_millis(mark - 1);
        let (end, expired) = match self.header_since.load(Ordering::Relaxed) {
            0 => (
                at(self.idle_since.load(Ordering::Relaxed)) + limits.idle,
                Verdict::Idle,
            ),
            since => (at(since) + limits.header, Verdict::Late),
        };
        if now >= end {
            return expired;
        }
        // A header may begin to arrive any time, so the next look is no later than its time-out.
        Verdict::Wait(end.min(now + limits.header))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}

/// A request whose answer is not finished.
pub(super) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.now(), Ordering::Relaxed);
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that notes when something is read.
struct Watched<I> {
    inner: TokioIo<I>,
    activity: Arc<Activity>,
}

impl<I: AsyncRead + Unpin> hyper::rt::Read for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if read.is_ready() {
            self.activity.read();
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> hyper::rt::Write for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        header: Duration::from_secs(15),
        idle: Duration::from_secs(60),
    };

    fn after(activity: &Activity, seconds: u64) -> Verdict {
        activity.verdict(activity.epoch + Duration::from_secs(seconds), &LIMITS)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_late() {
        let activity = Activity::new();
        assert!(matches!(after(&activity, 14), Verdict::Wait(_)));
        assert_eq!(after(&activity, 15), Verdict::Late);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_may_take_as_long_as_it_likes() {
        let activity = Arc::new(Activity::new());
        let _busy = activity.begin(false);
        assert!(matches!(after(&activity, 100_000), Verdict::Wait(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_header_has_its_own_time() {
        let activity = Arc::new(Activity::new());
        tokio::time::advance(Duration::from_secs(100)).await;
        drop(activity.begin(false));
        assert!(matches!(after(&activity, 159), Verdict::Wait(_)));
        assert_eq!(after(&activity, 160), Verdict::Idle);
        tokio::time::advance(Duration::from_secs(30)).await;
        activity.read();
        assert!(matches!(after(&activity, 144), Verdict::Wait(_)));
        assert_eq!(after(&activity, 145), Verdict::Late);
    }

    #[tokio::test(start_paused = true)]
    async fn housekeeping_of_http2_is_not_a_late_header() {
        let activity = Arc::new(Activity::new());
        drop(activity.begin(true));
        activity.read();
        assert_eq!(after(&activity, 60), Verdict::Idle);
        assert!(matches!(after(&activity, 59), Verdict::Wait(_)));
    }
}
