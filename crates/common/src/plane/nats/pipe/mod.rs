//! A pipe: bytes in order, both ways, over messages that may be lost.
//!
//! Messages of a direction are numbered, and one that is missing or comes twice ends the pipe: nothing is lost unnoticed,
//! and nothing is sent again. The other end may be ahead of its reader by a window only, which counts each message's
//! bytes and [`MESSAGE`]. What was read is told with whatever goes the other way, or by itself when half a window is
//! untold. So a pipe never has more in the server, or in the library's queue, than a window; and what is written
//! waits when the reader does not read, so that the plane merges what it has to say.
//!
//! Both halves see to both directions: a writer that waits for room takes in what arrives, though nobody reads.

mod halves;
mod outbox;

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use async_nats::{Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures::{Stream, task::AtomicWaker};
use parking_lot::Mutex;
use tokio::time::{self, Duration, Instant, Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::wire::Packet;
use crate::nats::{Connection, Life, SUBSCRIPTION};
pub(super) use halves::{ReadHalf, WriteHalf};
use outbox::{Kind, Outbox};

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
