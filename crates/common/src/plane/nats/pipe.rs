//! A pipe: bytes in order, both ways, over messages that may be lost.
//!
//! Messages of a direction are numbered, and one that is missing or comes twice ends the pipe: nothing is lost unnoticed,
//! and nothing is sent again. The other end may be ahead of its reader by a window only, which counts each message's
//! bytes and [`MESSAGE`]. What was read is told with whatever goes the other way, or by itself when half a window is
//! untold. So a pipe never has more in the server, or in the library's queue, than a window; and what is written
//! waits when the reader does not read, so that the plane merges what it has to say.
//!
//! Both halves see to both directions: a writer that waits for room takes in what arrives, though nobody reads.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
};

use async_nats::{Client, Message, StatusCode, Subject, Subscriber, message::OutboundMessage};
use bytes::{Buf, Bytes};
use futures::{Sink, Stream, task::AtomicWaker};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{self, Duration, Instant, Sleep},
};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::wire::{HEADER, Packet};
use crate::nats::{Connection, Life, SUBSCRIPTION};

/// What an end takes before it has read: far more than a step, and enough for 1 GB/s at a round trip of 1 ms. A server
/// holds 64 MiB for a process (`max_pending`), so 64 workers may stall together and none is cut off.
pub(super) const WINDOW: u32 = 1 << 20;

/// What a message counts beside its bytes: about what the library and the server keep for it.
const MESSAGE: u64 = 64;

// A window of the smallest messages fits into the library's queue.
const _: () = assert!((WINDOW as u64 / MESSAGE) < SUBSCRIPTION as u64);

/// The largest message, also where the server allows more: a longer one would hold up the other pipes of the
/// process, and costs no less per byte.
const LARGEST: usize = 256 << 10;

/// A peer that is silent for this long is asked for, so that one that is gone is noticed.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Why a pipe is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Broken {
    #[error("the connection to the NATS server was lost")]
    Server,
    #[error("the peer is gone from NATS")]
    Gone,
    #[error("message {got} came where {due} was due: some were lost")]
    Hole { due: u64, got: u64 },
    #[error("the peer sent what is no message of a pipe")]
    Malformed,
    #[error("the peer sent more than its window")]
    Overrun,
    #[error("the peer claims to have read more than was sent")]
    Claim,
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> Self {
        let kind = match broken {
            Broken::Server | Broken::Gone | Broken::Hole { .. } => io::ErrorKind::ConnectionReset,
            Broken::Malformed | Broken::Overrun | Broken::Claim => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, broken)
    }
}

/// What both halves share.
struct Pipe {
    /// Wakes both halves: what is waited for by one may be noticed by the other.
    waker: Waker,
    halves: Arc<Halves>,
    inbox: Mutex<Inbox>,
    outbox: Mutex<Outbox>,
    /// What may be under way to the peer.
    window: u64,
    /// How much of what was sent the peer has read.
    acknowledged: AtomicU64,
    /// How much of what arrived was read here.
    read: AtomicU64,
}

#[derive(Default)]
struct Halves {
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Wake for Halves {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.reader.wake();
        self.writer.wake();
    }
}

/// What arrives.
struct Inbox {
    messages: Subscriber,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    probe: Pin<Box<Sleep>>,
    /// Whether anything came since the last look for silence.
    heard: bool,
    /// The number that is due.
    due: u64,
    /// Arrived and not read.
    waiting: VecDeque<Bytes>,
    /// What of the window they take.
    held: u64,
    /// Bytes that were read of the front one.
    begun: u64,
    /// The peer writes nothing more. It may still read.
    closed: bool,
    /// Why nothing more comes or goes.
    broken: Option<Broken>,
}

/// What leaves.
struct Outbox {
    client: Client,
    to: Subject,
    /// Where the peer sends to; the server answers there if the peer is gone.
    from: Subject,
    number: u64,
    /// How much of the peer's window was used, ever.
    sent: u64,
    /// The latest `read` that the peer was told.
    told: u64,
    closed: bool,
}

/// The way in.
pub(super) struct ReadHalf(Arc<Pipe>);

/// The way out. Dropping it closes the pipe.
pub(super) struct WriteHalf {
    pipe: Arc<Pipe>,
    /// Until all is with the server.
    flush: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send>>>,
}

/// The two ends of what a pipe is made of.
pub(super) struct Ends {
    /// Subscribed to `from`.
    pub(super) messages: Subscriber,
    pub(super) from: Subject,
    pub(super) to: Subject,
    /// What the peer takes before it has read.
    pub(super) window: u32,
    pub(super) life: Life,
}

/// Makes a pipe of an introduction.
pub(super) fn pipe(connection: &Connection, ends: Ends) -> (ReadHalf, WriteHalf) {
    let halves = Arc::new(Halves::default());
    let pipe = Arc::new(Pipe {
        waker: Waker::from(halves.clone()),
        halves,
        inbox: Mutex::new(Inbox {
            messages: ends.messages,
            over: Box::pin(ends.life.cancelled_owned()),
            probe: Box::pin(time::sleep(PROBE_EVERY)),
            heard: false,
            due: 0,
            waiting: VecDeque::new(),
            held: 0,
            begun: 0,
            closed: false,
            broken: None,
        }),
        outbox: Mutex::new(Outbox {
            client: connection.client().clone(),
            to: ends.to,
            from: ends.from,
            number: 0,
            sent: 0,
            told: 0,
            closed: false,
        }),
        window: ends.window.into(),
        acknowledged: AtomicU64::new(0),
        read: AtomicU64::new(0),
    });
    let reader = ReadHalf(pipe.clone());
    (reader, WriteHalf { pipe, flush: None })
}

impl Pipe {
    /// Takes in what has arrived, until nothing is there. Both halves are woken when more is.
    fn take_in(&self, inbox: &mut Inbox) {
        let mut cx = Context::from_waker(&self.waker);
        while inbox.broken.is_none() {
            match Pin::new(&mut inbox.messages).poll_next(&mut cx) {
                Poll::Ready(Some(message)) => {
                    inbox.broken = self.take(inbox, message).err();
                }
                Poll::Ready(None) => inbox.broken = Some(Broken::Server),
                Poll::Pending => break,
            }
        }
        if inbox.broken.is_none() && inbox.over.as_mut().poll(&mut cx).is_ready() {
            inbox.broken = Some(Broken::Server);
        }
        while inbox.broken.is_none() && inbox.probe.as_mut().poll(&mut cx).is_ready() {
            inbox.probe.as_mut().reset(Instant::now() + PROBE_EVERY);
            if !std::mem::take(&mut inbox.heard) {
                // One that does not leave now is made up for by the next.
                let _ = self
                    .outbox
                    .lock()
                    .poll_send(&mut cx, &self.read, Kind::Probe);
            }
        }
    }

    fn take(&self, inbox: &mut Inbox, message: Message) -> Result<(), Broken> {
        inbox.heard = true;
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(Broken::Gone);
        }
        let packet = Packet::decode(message.payload).ok_or(Broken::Malformed)?;
        if packet.number != inbox.due {
            let (due, got) = (inbox.due, packet.number);
            return Err(Broken::Hole { due, got });
        }
        inbox.due += 1;
        // Only this, under the lock of the inbox, writes it.
        let known = self.acknowledged.load(Ordering::Relaxed);
        if packet.read > known {
            if packet.read > self.outbox.lock().sent {
                return Err(Broken::Claim);
            }
            self.acknowledged.store(packet.read, Ordering::Release);
        }
        if !packet.bytes.is_empty() {
            inbox.held += cost(packet.bytes.len());
            inbox.waiting.push_back(packet.bytes);
            if inbox.held > WINDOW.into() {
                return Err(Broken::Overrun);
            }
            if inbox.closed {
                return Err(Broken::Malformed);
            }
        }
        inbox.closed |= packet.last;
        Ok(())
    }

    /// Returns how many bytes the peer takes now, in one message.
    fn room(&self, outbox: &Outbox) -> u64 {
        let under_way = outbox.sent - self.acknowledged.load(Ordering::Acquire);
        self.window.saturating_sub(under_way + MESSAGE)
    }
}

fn cost(bytes: usize) -> u64 {
    bytes as u64 + MESSAGE
}

/// What a message is for.
#[derive(Clone, Copy)]
enum Kind<'a> {
    Data(&'a [u8]),
    /// Tells what was read, and nothing else.
    Read,
    /// Asks for the peer: the server answers if there is none.
    Probe,
    Close,
}

impl Outbox {
    /// Sends a message, if the library takes one. It takes it whole.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        read: &AtomicU64,
        kind: Kind<'_>,
    ) -> Poll<io::Result<()>> {
        let mut client = Pin::new(&mut self.client);
        ready!(client.as_mut().poll_ready(cx)).map_err(io::Error::other)?;
        let read = read.load(Ordering::Relaxed);
        let (data, last) = match kind {
            Kind::Data(data) => (data, false),
            Kind::Read | Kind::Probe => (&[][..], false),
            Kind::Close => (&[][..], true),
        };
        let message = OutboundMessage {
            subject: self.to.clone(),
            reply: matches!(kind, Kind::Probe).then(|| self.from.clone()),
            payload: Packet::encode(last, self.number, read, data),
            headers: None,
        };
        client.start_send(message).map_err(io::Error::other)?;
        self.number += 1;
        if !data.is_empty() {
            self.sent += cost(data.len());
        }
        self.told = read;
        self.closed |= last;
        Poll::Ready(Ok(()))
    }
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
