//! The processor's end: one [`Client`] per worker, which connects again by itself.
//!
//! A task per client dials, reads and distributes deltas to slots. Requests are written to the socket
//! by whoever makes them (see `outbound`).

use std::{
    io,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::Duration,
};

use ahash::AHashMap;
use bytes::{Buf, Bytes, BytesMut};
use futures::future::poll_fn;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    io::AsyncReadExt,
    sync::{oneshot, watch},
    time::{self, Instant},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use super::{
    DEAD_AFTER, PING_EVERY, PlaneError, SOFTWARE, delta,
    frame::{self, BlobPart, FrameError, Kind},
    net::{Dial, Io, Reader, Tcp},
    outbound::Outbound,
    stream::{After, DeltaStream, Slot},
};
use crate::{
    Code,
    ids::{BlobHash, WorkerId},
    proto::{
        plane,
        worker::{GenerateRequest, Load, StepDeltas},
    },
};

/// Free room that a read finds in the buffer: about two steps of 1,024 streams.
const READ_ROOM: usize = 64 << 10;

/// A worker on the same network answers in milliseconds; this covers one that is starved of CPU.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The wait before the second attempt to connect; it doubles up to [`BACK_OFF_MOST`].
const BACK_OFF_FIRST: Duration = Duration::from_millis(50);

/// The longest wait between two attempts: discovery forgets a dead worker after 10 s anyway.
const BACK_OFF_MOST: Duration = Duration::from_secs(2);

/// The largest blob that is taken: tokenizers reach 40 MiB.
const MAX_BLOB: usize = 256 << 20;

/// How a processor connects.
#[derive(Clone)]
pub struct ClientConfig {
    /// The worker meant; another one at the same address is refused. Absent: any.
    pub worker: Option<WorkerId>,
    /// The shared secret, for workers that ask for one.
    pub token: Option<String>,
    /// Bytes that may wait to be written before new requests are refused; default 64 MiB.
    pub max_backlog: usize,
    /// Default [`PING_EVERY`].
    pub ping_every: Duration,
    /// Default [`DEAD_AFTER`].
    pub dead_after: Duration,
    /// Seed of the back-off's jitter; default random.
    pub seed: u64,
    /// How to dial; default TCP.
    pub dial: Arc<dyn Dial>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            worker: None,
            token: None,
            max_backlog: 64 << 20,
            ping_every: PING_EVERY,
            dead_after: DEAD_AFTER,
            seed: rand::random(),
            dial: Arc::new(Tcp),
        }
    }
}

/// How a client stands with its worker.
#[derive(Clone, Debug)]
pub enum State {
    /// Dialling, for the first time or again.
    Connecting { reason: String },
    /// Requests are taken.
    Ready,
    /// The worker finishes what runs and takes nothing new.
    Draining,
    /// The worker refused this client for good (another version, a wrong token, another worker at its
    /// address). Nothing is tried any more.
    Gone { code: Code, message: String },
}

/// A processor's link to one worker. Cheap to clone. Dropping the last clone closes the connection, and
/// streams that still run end as disconnected.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    address: String,
    max_backlog: usize,
    state: watch::Sender<State>,
    link: Mutex<Option<Arc<Link>>>,
    load: Mutex<Load>,
    _stop: DropGuard,
}

impl Client {
    /// Starts to connect to `address` (`host:port`), in a task of its own.
    pub fn connect(address: impl Into<String>, config: ClientConfig) -> Self {
        let stop = CancellationToken::new();
        let (state, _) = watch::channel(State::Connecting {
            reason: "first attempt".to_owned(),
        });
        let shared = Arc::new(Shared {
            address: address.into(),
            max_backlog: config.max_backlog,
            state,
            link: Mutex::new(None),
            load: Mutex::new(Load::default()),
            _stop: stop.clone().drop_guard(),
        });
        let task = Task {
            address: shared.address.clone(),
            shared: Arc::downgrade(&shared),
            config,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.run() => {}
            }
        });
        Self { shared }
    }

    /// Returns where the worker is.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// Returns how it stands with the worker, now and from now on.
    pub fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    /// Waits until requests are taken. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::Refused`]: they will never be. It waits as long as the worker cannot be reached.
    pub async fn ready(&self) -> Result<(), PlaneError> {
        let mut state = self.state();
        let state = state
            .wait_for(|state| matches!(state, State::Ready | State::Gone { .. }))
            .await
            .map(|state| state.clone());
        match state {
            Ok(State::Gone { code, message }) => Err(self.refused(code, message)),
            // The sender lives in `self.shared`.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Returns the load that the worker last told, zeros before.
    pub fn load(&self) -> Load {
        *self.shared.load.lock()
    }

    /// Returns how many requests of this client run at the worker.
    pub fn in_flight(&self) -> usize {
        self.shared
            .link
            .lock()
            .as_ref()
            .map_or(0, |link| link.streams.lock().open.len())
    }

    /// Sends a request. Written by the caller's own task, without waiting.
    ///
    /// # Errors
    /// What stands in the way of sending it. What the worker has against it comes as the stream's
    /// last delta.
    pub fn generate(&self, request: &GenerateRequest) -> Result<DeltaStream, PlaneError> {
        let link = self.link()?;
        if matches!(*self.shared.state.borrow(), State::Draining) {
            return Err(PlaneError::Draining {
                address: self.shared.address.clone(),
            });
        }
        let size = prost::Message::encoded_len(request);
        let limit = frame::MAX_FRAME - frame::HEADER;
        if size > limit {
            return Err(PlaneError::TooLarge { size, limit });
        }
        let slot = Arc::new(Slot::default());
        let stream = {
            // Numbers rise on the wire, so the number is given under the lock of the way out.
            let mut out = link.out.lock();
            if out.buf.len() + size > self.shared.max_backlog {
                return Err(PlaneError::Backlog {
                    address: self.shared.address.clone(),
                    queued: out.buf.len(),
                    limit: self.shared.max_backlog,
                });
            }
            let stream = link.streams.lock().add(&slot)?;
            frame::put_submit(&mut out.buf, stream, request);
            out.flush();
            stream
        };
        Ok(DeltaStream::new(link, slot, stream))
    }

    /// Fetches a file by its content. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::NoBlob`], [`PlaneError::WrongBlob`], a lost connection.
    pub async fn blob(&self, hash: &BlobHash) -> Result<Bytes, PlaneError> {
        let link = self.link()?;
        let (done, answer) = oneshot::channel();
        {
            let mut blobs = link.blobs.lock();
            let number = blobs.next;
            blobs.next = blobs.next.wrapping_add(1);
            blobs.waiting.insert(
                number,
                BlobWait {
                    bytes: BytesMut::new(),
                    done,
                },
            );
            drop(blobs);
            let mut out = link.out.lock();
            frame::put_blob_request(&mut out.buf, number, hash);
            out.flush();
        }
        let lost = || PlaneError::Disconnected {
            address: self.shared.address.clone(),
            reason: "while a file was fetched".to_owned(),
        };
        if link.streams.lock().ended.is_some() {
            return Err(lost());
        }
        match answer.await {
            Err(_) => Err(lost()),
            Ok(None) => Err(PlaneError::NoBlob {
                address: self.shared.address.clone(),
                hash: hash.clone(),
            }),
            Ok(Some(bytes)) if BlobHash::of(&bytes) == *hash => Ok(bytes),
            Ok(Some(_)) => Err(PlaneError::WrongBlob {
                address: self.shared.address.clone(),
                hash: hash.clone(),
            }),
        }
    }

    fn link(&self) -> Result<Arc<Link>, PlaneError> {
        if let Some(link) = &*self.shared.link.lock() {
            return Ok(link.clone());
        }
        Err(match self.shared.state.borrow().clone() {
            State::Gone { code, message } => self.refused(code, message),
            State::Connecting { reason } => self.not_connected(reason),
            State::Ready | State::Draining => self.not_connected("just lost".to_owned()),
        })
    }

    fn refused(&self, code: Code, message: String) -> PlaneError {
        PlaneError::Refused {
            address: self.shared.address.clone(),
            code,
            message,
        }
    }

    fn not_connected(&self, reason: String) -> PlaneError {
        PlaneError::NotConnected {
            address: self.shared.address.clone(),
            reason,
        }
    }
}

/// One connection, from Welcome to its end.
pub(super) struct Link {
    out: Mutex<Outbound>,
    streams: Mutex<Streams>,
    blobs: Mutex<Blobs>,
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
    fn new(out: Outbound) -> Self {
        Self {
            out: Mutex::new(out),
            streams: Mutex::default(),
            blobs: Mutex::default(),
        }
    }

    /// Tells the worker that nobody reads a stream any more, unless it has ended.
    pub(super) fn cancel(&self, stream: u32) {
        if self.streams.lock().open.remove(&stream).is_some() {
            self.put_cancel(stream);
        }
    }

    fn put_cancel(&self, stream: u32) {
        let mut out = self.out.lock();
        frame::put_cancel(&mut out.buf, stream);
        out.flush();
    }

    /// Ends every stream.
    fn end(&self, error: &PlaneError) {
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
    fn step(&self, step: StepDeltas) {
        let mut overflowed = Vec::new();
        {
            let mut streams = self.streams.lock();
            for delta in step.deltas {
                let stream = delta.stream;
                // Absent: cancelled a moment ago.
                let Some(slot) = streams.open.get(&stream) else {
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
    }

    fn blob(&self, payload: &[u8]) -> Result<(), FrameError> {
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

    fn poll_drive(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self.out.lock().poll_flush(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(error),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    }
}

/// Why a connection, or an attempt at one, ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("closed by the worker")]
    ByPeer,
    #[error("no answer within {} s", CONNECT_WITHIN.as_secs())]
    NoAnswer,
    #[error("not heard of for {} s", .0.as_secs())]
    Dead(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("refused: {message}")]
    Refused { code: Code, message: String },
    #[error("nobody uses it any more")]
    Unused,
}

/// Dials and reads for a [`Client`].
struct Task {
    shared: Weak<Shared>,
    address: String,
    config: ClientConfig,
}

impl Task {
    async fn run(self) {
        let mut random = SmallRng::seed_from_u64(self.config.seed);
        let mut wait = BACK_OFF_FIRST;
        loop {
            let mut buf = BytesMut::with_capacity(READ_ROOM);
            let greeted = time::timeout(CONNECT_WITHIN, self.greet(&mut buf)).await;
            let ended = match greeted.unwrap_or(Err(Ended::NoAnswer)) {
                Ok((link, reader)) => {
                    wait = BACK_OFF_FIRST;
                    self.serve(&link, reader, buf).await
                }
                Err(ended) => ended,
            };
            let Some(shared) = self.shared.upgrade() else {
                return;
            };
            match ended {
                Ended::Refused { code, message } => {
                    warn!(worker = %self.address, %message, "refused by the worker");
                    shared.state.send_replace(State::Gone { code, message });
                    return;
                }
                Ended::Unused => return,
                ended => {
                    debug!(worker = %self.address, reason = %ended, "not connected");
                    shared.state.send_replace(State::Connecting {
                        reason: ended.to_string(),
                    });
                }
            }
            drop(shared);
            // Many processors lose a worker at once; they should not all come back at once.
            time::sleep(wait.mul_f64(random.random_range(0.5..1.5))).await;
            wait = (wait * 2).min(BACK_OFF_MOST);
        }
    }

    /// Dials, says Hello and reads the answer.
    async fn greet(&self, buf: &mut BytesMut) -> Result<(Arc<Link>, Reader), Ended> {
        let Io { mut reader, writer } = self.config.dial.dial(&self.address).await?;
        let mut out = Outbound::new(writer);
        let hello = plane::Hello {
            software: SOFTWARE.to_owned(),
            token: self.config.token.clone().unwrap_or_default().into_bytes(),
            worker: self
                .config
                .worker
                .clone()
                .map(|id| id.0)
                .unwrap_or_default(),
        };
        frame::put_hello(&mut out.buf, &hello);
        poll_fn(|cx| out.poll_flush(cx)).await?;
        let header = loop {
            if let Some(header) = frame::peek(buf, frame::MAX_HELLO)? {
                break header;
            }
            if reader.read_buf(buf).await? == 0 {
                return Err(Ended::ByPeer);
            }
        };
        let payload = frame::take(buf, header);
        let peer = frame::introduction(&payload)?;
        if peer.major != frame::MAJOR {
            return Err(Ended::Refused {
                code: Code::Incompatible,
                message: format!(
                    "the processor speaks plane version {}.{}, the worker {}.{}: the first numbers must be equal",
                    frame::MAJOR,
                    frame::MINOR,
                    peer.major,
                    peer.minor
                ),
            });
        }
        match header.kind {
            Some(Kind::Welcome) => {
                let welcome: plane::Welcome = frame::message(Kind::Welcome, peer.message)?;
                info!(worker = %self.address, id = welcome.worker, software = welcome.software, "connected");
                Ok((Arc::new(Link::new(out)), reader))
            }
            Some(Kind::Reject) => {
                let error: crate::proto::worker::Error =
                    frame::message(Kind::Reject, peer.message)?;
                Err(Ended::Refused {
                    code: error.code().into(),
                    message: error.message,
                })
            }
            _ => Err(FrameError::NotStator.into()),
        }
    }

    /// Offers the link to the client and reads until the connection ends.
    async fn serve(&self, link: &Arc<Link>, reader: Reader, buf: BytesMut) -> Ended {
        {
            let Some(shared) = self.shared.upgrade() else {
                return Ended::Unused;
            };
            *shared.link.lock() = Some(link.clone());
            shared.state.send_replace(State::Ready);
        }
        // Ends the streams also when the task itself is ended.
        let _end = EndOnDrop {
            link,
            shared: &self.shared,
            address: &self.address,
            reason: Mutex::new("the client was closed".to_owned()),
        };
        let ended = self.read(link, reader, buf).await;
        *_end.reason.lock() = ended.to_string();
        ended
    }

    async fn read(&self, link: &Link, mut reader: Reader, mut buf: BytesMut) -> Ended {
        let mut heard = Instant::now();
        let mut beat = time::interval(self.config.ping_every);
        beat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut beats = 0;
        loop {
            if let Err(ended) = self.handle(link, &mut buf) {
                return ended;
            }
            buf.reserve(READ_ROOM);
            tokio::select! {
                biased;
                error = poll_fn(|cx| link.poll_drive(cx)) => return error.into(),
                _ = beat.tick() => {
                    if heard.elapsed() > self.config.dead_after {
                        return Ended::Dead(self.config.dead_after);
                    }
                    beats += 1;
                    let mut out = link.out.lock();
                    frame::put_beat(&mut out.buf, Kind::Ping, beats);
                    out.flush();
                }
                read = reader.read_buf(&mut buf) => match read {
                    Ok(0) => return Ended::ByPeer,
                    Ok(_) => heard = Instant::now(),
                    Err(error) => return error.into(),
                },
            }
        }
    }

    /// Handles every frame that has arrived in full.
    fn handle(&self, link: &Link, buf: &mut BytesMut) -> Result<(), Ended> {
        while let Some(header) = frame::peek(buf, frame::MAX_FRAME)? {
            let payload = &buf[frame::HEADER..frame::HEADER + header.payload];
            match header.kind {
                Some(Kind::Step) => {
                    let step: StepDeltas = frame::message(Kind::Step, payload)?;
                    if let Some(load) = step.load {
                        self.with(|shared| *shared.load.lock() = load);
                    }
                    link.step(step);
                }
                Some(Kind::Pong) => {
                    frame::beat(Kind::Pong, payload)?;
                }
                Some(Kind::Draining) => {
                    info!(worker = %self.address, "the worker is draining");
                    self.with(|shared| drop(shared.state.send_replace(State::Draining)));
                }
                Some(Kind::Blob) => link.blob(payload)?,
                Some(
                    kind @ (Kind::Hello
                    | Kind::Welcome
                    | Kind::Reject
                    | Kind::Submit
                    | Kind::Cancel
                    | Kind::Ping
                    | Kind::BlobRequest),
                ) => return Err(FrameError::Unexpected { kind }.into()),
                None => debug!(worker = %self.address, "skipped a frame of an unknown kind"),
            }
            buf.advance(frame::HEADER + header.payload);
        }
        Ok(())
    }

    fn with(&self, f: impl FnOnce(&Shared)) {
        if let Some(shared) = self.shared.upgrade() {
            f(&shared);
        }
    }
}

/// Ends all streams of a link, whatever ends its task.
struct EndOnDrop<'a> {
    link: &'a Arc<Link>,
    shared: &'a Weak<Shared>,
    address: &'a str,
    reason: Mutex<String>,
}

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            *shared.link.lock() = None;
        }
        self.link.end(&PlaneError::Disconnected {
            address: self.address.to_owned(),
            reason: std::mem::take(&mut self.reason.lock()),
        });
    }
}
