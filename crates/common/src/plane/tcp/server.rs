//! The worker's end: accepts processors, reads their requests, writes steps.
//!
//! One task per connection reads; whoever has outputs writes them itself (see `outbound`). While a
//! socket takes no more, deltas of one stream merge into one, so what waits is bounded by what the engine
//! can produce for the streams of that processor, and no other processor notices.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use ahash::AHashMap;
use bytes::{Bytes, BytesMut};
use futures::future::poll_fn;
use parking_lot::Mutex;
use tokio::{io::AsyncReadExt, task::JoinSet, time};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    DEAD_AFTER, SOFTWARE, delta,
    frame::{self, BlobChunk, BlobPart, FrameError, Kind},
    net::{Io, Listen, Reader},
    outbound::Outbound,
};
use crate::{
    Code,
    drain::Drain,
    ids::{BlobHash, WorkerId},
    proto::{
        plane,
        worker::{Delta, GenerateRequest, Load, StepDeltas},
    },
};

/// Free room that a read finds in the buffer: about two steps of 1,024 streams.
const READ_ROOM: usize = 64 << 10;

/// Prompts from this size on share memory with the read buffer instead of being copied.
const ZERO_COPY_FROM: usize = 8 << 10;

/// A frame of deltas is closed when it is this large, so that a backlog is not sent in one piece.
const STEP_BYTES: usize = 4 << 20;

/// A peer that does not introduce itself within this time is no processor.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// What a closing server gives its peers to take what was written.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// Blobs that one peer may have asked for and not yet received.
const MAX_BLOBS: usize = 64;

/// How a worker listens.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Who answers here.
    pub worker: WorkerId,
    /// The shared secret that peers must present; absent: anybody may connect.
    pub token: Option<String>,
    /// The largest frame that is read; default [`frame::MAX_FRAME`].
    pub max_frame: usize,
    /// Bytes of merged deltas that may wait for one peer before its connection is ended as stuck;
    /// default 256 MiB.
    pub max_backlog: usize,
    /// A peer not heard of for this long is dead; default [`DEAD_AFTER`].
    pub dead_after: Duration,
}

impl ServerConfig {
    /// Returns the defaults, open to anybody.
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            token: None,
            max_frame: frame::MAX_FRAME,
            max_backlog: 256 << 20,
            dead_after: DEAD_AFTER,
        }
    }
}

/// What a worker does with what arrives. Called from the connection's task: must not block.
pub trait Handler: Send + Sync + 'static {
    /// A processor connected; its requests may follow.
    fn opened(&self, _connection: &Arc<Connection>) {}

    /// Takes a request. Every stream ends in exactly one last delta, sent by
    /// [`Connection::send`], unless it is cancelled or its connection closes.
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest);

    /// Nobody reads this stream any more; it may already have ended.
    fn cancel(&self, connection: &Arc<Connection>, stream: u32);

    /// The connection is gone with all its streams.
    fn closed(&self, connection: &Arc<Connection>);

    /// Returns a file by its content.
    fn blob(&self, hash: &BlobHash) -> Option<Bytes>;
}

/// A bound listener that does not serve yet.
pub struct Server {
    listener: Arc<dyn Listen>,
    config: ServerConfig,
}

impl Server {
    /// Binds a TCP listener; port 0 takes any. Peers that connect now wait until
    /// [`spawn`](Self::spawn).
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn bind(address: SocketAddr, config: ServerConfig) -> io::Result<Self> {
        Ok(Self::on(Arc::new(super::net::listen(address)?), config))
    }

    /// Serves on a listener of another kind.
    pub fn on(listener: Arc<dyn Listen>, config: ServerConfig) -> Self {
        Self { listener, config }
    }

    /// Returns the bound address.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts from now on, in a task of its own. When `drain` says so, peers are told that nothing new is
    /// taken; that new requests are refused is the handler's part.
    pub fn spawn(self, handler: Arc<impl Handler>, drain: Drain) -> ServerHandle {
        let stop = CancellationToken::new();
        let task = tokio::spawn(accept(self, handler, drain, stop.clone()));
        ServerHandle {
            task,
            _guard: stop.clone().drop_guard(),
            stop,
        }
    }
}

/// A serving listener. Dropping it closes all connections.
pub struct ServerHandle {
    task: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
    _guard: tokio_util::sync::DropGuard,
}

impl ServerHandle {
    /// Stops accepting, lets what was sent reach the peers, and closes all connections.
    pub async fn close(self) {
        self.stop.cancel();
        // The task only fails by a panic, which was reported when it happened.
        let _ = self.task.await;
    }
}

async fn accept(server: Server, handler: Arc<impl Handler>, drain: Drain, stop: CancellationToken) {
    let Server { listener, config } = server;
    let config = Arc::new(config);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((io, peer)) => {
                let peer = Peer {
                    address: peer,
                    config: config.clone(),
                    drain: drain.clone(),
                    stop: stop.clone(),
                };
                connections.spawn(peer.run(io, handler.clone()));
            }
            Err(error) => {
                // Out of descriptors, or a peer that left in between: neither ends a server.
                warn!(%error, "accept a connection");
                time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// One processor's connection, for whoever has outputs for it.
pub struct Connection {
    id: u64,
    peer: SocketAddr,
    state: Mutex<Sending>,
    closed: CancellationToken,
    max_backlog: usize,
}

/// What waits to be sent. Order: encoded frames, then merged deltas, then blobs.
struct Sending {
    out: Outbound,
    /// Deltas that came while the socket was busy, one per stream; `index` says where.
    waiting: Vec<Delta>,
    index: AHashMap<u32, usize>,
    /// About how many bytes they hold.
    weight: usize,
    load: Option<Load>,
    pong: Option<u64>,
    blobs: VecDeque<BlobAnswer>,
}

struct BlobAnswer {
    number: u32,
    /// Absent: there is no such blob.
    rest: Option<Bytes>,
}

impl Connection {
    fn new(peer: SocketAddr, out: Outbound, max_backlog: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            peer,
            state: Mutex::new(Sending {
                out,
                waiting: Vec::new(),
                index: AHashMap::new(),
                weight: 0,
                load: None,
                pong: None,
                blobs: VecDeque::new(),
            }),
            closed: CancellationToken::new(),
            max_backlog,
        }
    }

    /// Returns a number that no other connection of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns who is at the other end.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Says whether the connection is gone. What is sent to it then is dropped.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Sends the deltas of one engine step, in one frame if the socket is free, else merged with what already
    /// waits. Never blocks, never fails: a connection that cannot be written to closes. `deltas`
    /// is emptied; its memory stays the caller's.
    pub fn send(&self, deltas: &mut Vec<Delta>, load: Option<Load>) {
        let mut sending = self.state.lock();
        if self.is_closed() || (deltas.is_empty() && load.is_none()) {
            deltas.clear();
            return;
        }
        if sending.is_idle() {
            let mut step = StepDeltas {
                deltas: std::mem::take(deltas),
                load,
            };
            // Only prompt log-probabilities make a step that does not fit into one frame.
            if step.deltas.iter().map(delta::weight).sum::<usize>() <= STEP_BYTES {
                frame::put_step(&mut sending.out.buf, &step);
                sending.out.flush();
                step.deltas.clear();
                *deltas = step.deltas;
                return;
            }
            *deltas = step.deltas;
        }
        for delta in deltas.drain(..) {
            sending.merge(delta);
        }
        if load.is_some() {
            sending.load = load;
        }
        if sending.weight > self.max_backlog {
            warn!(peer = %self.peer, bytes = sending.weight, "the processor takes no outputs: closing its connection");
            self.closed.cancel();
            return;
        }
        sending.flush();
    }

    /// Sends the load alone.
    pub fn send_load(&self, load: Load) {
        self.send(&mut Vec::new(), Some(load));
    }

    /// Ends a stream with an error.
    pub fn fail(&self, stream: u32, code: Code, message: impl Into<String>) {
        self.send(&mut vec![delta::failed(stream, code, message)], None);
    }

    /// Closes the connection, and with it all its streams.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Returns how many deltas wait because the peer does not read.
    #[cfg(test)]
    pub(crate) fn waiting_streams(&self) -> usize {
        self.state.lock().waiting.len()
    }

    fn control(&self, put: impl FnOnce(&mut Sending)) {
        let mut sending = self.state.lock();
        put(&mut sending);
        sending.flush();
    }

    /// Drives what others could not write, until the connection fails. For the connection's task.
    fn poll_drive(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            // Let go between frames, so that a long blob does not hold up a step.
            let mut sending = self.state.lock();
            match sending.out.poll_flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
            if !sending.refill() {
                return Poll::Pending;
            }
        }
    }

    /// Waits until everything that was sent is with the operating system.
    fn poll_drained(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.poll_drive(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => {
                let mut sending = self.state.lock();
                if sending.is_idle() {
                    sending.out.poll_shutdown(cx)
                } else {
                    Poll::Pending
                }
            }
        }
    }
}

impl Sending {
    fn is_idle(&self) -> bool {
        self.out.is_idle()
            && self.waiting.is_empty()
            && self.load.is_none()
            && self.pong.is_none()
            && self.blobs.is_empty()
    }

    fn merge(&mut self, delta: Delta) {
        self.weight += delta::weight(&delta);
        match self.index.get(&delta.stream) {
            Some(&at) => delta::merge(&mut self.waiting[at], delta),
            None => {
                self.index.insert(delta.stream, self.waiting.len());
                self.waiting.push(delta);
            }
        }
    }

    fn flush(&mut self) {
        self.out.flush();
        if self.out.is_idle() && self.refill() {
            self.out.flush();
        }
        if self.out.is_idle() && !self.is_idle() {
            // The rest is for the connection's task.
            self.out.wake();
        }
    }

    /// Encodes what waits next. Says whether there was anything. The encoded part must have been
    /// written.
    fn refill(&mut self) -> bool {
        let buf = &mut self.out.buf;
        if let Some(number) = self.pong.take() {
            frame::put_beat(buf, Kind::Pong, number);
        }
        if !self.waiting.is_empty() || self.load.is_some() {
            let mut bytes = 0;
            let fits = self
                .waiting
                .iter()
                .take_while(|delta| {
                    let first = bytes == 0;
                    bytes += delta::weight(delta);
                    first || bytes <= STEP_BYTES
                })
                .count();
            let rest = self.waiting.split_off(fits);
            let mut step = StepDeltas {
                deltas: std::mem::replace(&mut self.waiting, rest),
                load: self.load.take(),
            };
            for delta in &mut step.deltas {
                if prost::Message::encoded_len(delta) > frame::MAX_FRAME - STEP_BYTES {
                    *delta = delta::failed(
                        delta.stream,
                        Code::TooLarge,
                        "the output of one step is larger than a frame may be",
                    );
                }
            }
            frame::put_step(buf, &step);
            self.index.clear();
            self.index.extend(
                self.waiting
                    .iter()
                    .enumerate()
                    .map(|(at, d)| (d.stream, at)),
            );
            self.weight = self.waiting.iter().map(delta::weight).sum();
            return true;
        }
        if let Some(answer) = self.blobs.front_mut() {
            let number = answer.number;
            let (part, bytes) = match &mut answer.rest {
                None => (BlobPart::Missing, Bytes::new()),
                Some(rest) => {
                    let chunk = rest.split_to(rest.len().min(frame::BLOB_CHUNK));
                    let part = if rest.is_empty() {
                        BlobPart::Last
                    } else {
                        BlobPart::More
                    };
                    (part, chunk)
                }
            };
            frame::put_blob(
                buf,
                &BlobChunk {
                    number,
                    part,
                    bytes: &bytes,
                },
            );
            if part != BlobPart::More {
                self.blobs.pop_front();
            }
            return true;
        }
        !self.out.buf.is_empty()
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("closed by the peer")]
    ByPeer,
    #[error("the server closes")]
    Stopped,
    #[error("closed by this side")]
    ByUs,
    #[error("no Hello within {} s", HELLO_WITHIN.as_secs())]
    NoHello,
    #[error("refused: {0}")]
    Refused(String),
    #[error("not heard of for {} s", .0.as_secs())]
    Dead(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("stream {stream} after {last}: numbers must rise")]
    StreamNumber { stream: u32, last: u32 },
    #[error("more than {MAX_BLOBS} blobs asked for at once")]
    TooManyBlobs,
}

/// Everything that a connection's task needs beside its socket.
struct Peer {
    address: SocketAddr,
    config: Arc<ServerConfig>,
    drain: Drain,
    stop: CancellationToken,
}

impl Peer {
    async fn run(self, io: Io, handler: Arc<impl Handler>) {
        let Io { mut reader, writer } = io;
        let connection = Arc::new(Connection::new(
            self.address,
            Outbound::new(writer),
            self.config.max_backlog,
        ));
        let mut buf = BytesMut::with_capacity(READ_ROOM);
        let ended = match self.greet(&connection, &mut reader, &mut buf).await {
            Err(ended) => ended,
            Ok(software) => {
                info!(peer = %self.address, software, "processor connected");
                handler.opened(&connection);
                let ended = self
                    .serve(&connection, &mut reader, &mut buf, &*handler)
                    .await;
                connection.closed.cancel();
                handler.closed(&connection);
                ended
            }
        };
        match ended {
            Ended::ByPeer | Ended::Stopped => {
                info!(peer = %self.address, reason = %ended, "processor gone");
            }
            _ => warn!(peer = %self.address, reason = %ended, "processor gone"),
        }
        connection.closed.cancel();
        // A refusal or the last deltas are worth a moment; a peer that does not read them is not.
        let _ = time::timeout(FLUSH_WITHIN, poll_fn(|cx| connection.poll_drained(cx))).await;
        connection.state.lock().out.close();
    }

    /// Reads the Hello and answers it. Returns what the peer calls itself.
    async fn greet(
        &self,
        connection: &Connection,
        reader: &mut Reader,
        buf: &mut BytesMut,
    ) -> Result<String, Ended> {
        let hello = async {
            loop {
                if let Some(header) = frame::peek(buf, frame::MAX_HELLO)? {
                    return Ok(header);
                }
                if reader.read_buf(buf).await? == 0 {
                    return Err(Ended::ByPeer);
                }
            }
        };
        let header = tokio::select! {
            () = self.stop.cancelled() => return Err(Ended::Stopped),
            header = time::timeout(HELLO_WITHIN, hello) => header.map_err(|_| Ended::NoHello)??,
        };
        let Some(Kind::Hello) = header.kind else {
            return Err(FrameError::NotStator.into());
        };
        let payload = frame::take(buf, header);
        let peer = frame::introduction(&payload)?;
        if peer.major != frame::MAJOR {
            return Err(self.reject(
                connection,
                Code::Incompatible,
                format!(
                    "the worker speaks plane version {}.{}, the processor {}.{}: the first numbers must be equal",
                    frame::MAJOR,
                    frame::MINOR,
                    peer.major,
                    peer.minor
                ),
            ));
        }
        let hello: plane::Hello = frame::message(Kind::Hello, peer.message)?;
        if let Some(token) = &self.config.token {
            // Comparing hashes takes the same time wherever the difference is.
            if blake3::hash(token.as_bytes()) != blake3::hash(&hello.token) {
                return Err(self.reject(
                    connection,
                    Code::Unauthenticated,
                    "the worker asks for a token, and none or a wrong one was given".to_owned(),
                ));
            }
        }
        if !hello.worker.is_empty() && hello.worker != self.config.worker.0 {
            return Err(self.reject(
                connection,
                Code::NotFound,
                format!(
                    "worker {} is here, not {}",
                    self.config.worker, hello.worker
                ),
            ));
        }
        connection.control(|sending| {
            frame::put_welcome(
                &mut sending.out.buf,
                &plane::Welcome {
                    software: SOFTWARE.to_owned(),
                    worker: self.config.worker.0.clone(),
                },
            );
        });
        Ok(hello.software)
    }

    fn reject(&self, connection: &Connection, code: Code, message: String) -> Ended {
        connection.control(|sending| {
            frame::put_reject(&mut sending.out.buf, &super::error(code, message.clone()));
        });
        Ended::Refused(message)
    }

    /// Reads until the connection ends.
    async fn serve(
        &self,
        connection: &Arc<Connection>,
        reader: &mut Reader,
        buf: &mut BytesMut,
        handler: &impl Handler,
    ) -> Ended {
        let mut heard = time::Instant::now();
        let mut check = time::interval(self.config.dead_after / 3);
        let mut told_draining = false;
        let mut last_stream = 0;
        loop {
            match self.handle(connection, buf, handler, &mut last_stream) {
                Ok(()) => {}
                Err(ended) => return ended,
            }
            buf.reserve(READ_ROOM);
            tokio::select! {
                biased;
                error = poll_fn(|cx| connection.poll_drive(cx)) => return error.into(),
                () = connection.closed.cancelled() => return Ended::ByUs,
                () = self.stop.cancelled() => return Ended::Stopped,
                () = self.drain.draining(), if !told_draining => {
                    told_draining = true;
                    connection.control(|sending| frame::put_draining(&mut sending.out.buf));
                }
                _ = check.tick() => {
                    if heard.elapsed() > self.config.dead_after {
                        return Ended::Dead(self.config.dead_after);
                    }
                }
                read = reader.read_buf(buf) => match read {
                    Ok(0) => return Ended::ByPeer,
                    Ok(_) => heard = time::Instant::now(),
                    Err(error) => return error.into(),
                },
            }
        }
    }

    /// Handles every frame that has arrived in full.
    fn handle(
        &self,
        connection: &Arc<Connection>,
        buf: &mut BytesMut,
        handler: &impl Handler,
        last_stream: &mut u32,
    ) -> Result<(), Ended> {
        while let Some(header) = frame::peek(buf, self.config.max_frame)? {
            if header.kind == Some(Kind::Submit) {
                let (stream, request) = if header.payload >= ZERO_COPY_FROM {
                    frame::submit(frame::take(buf, header))?
                } else {
                    let submit = frame::submit(payload(buf, header))?;
                    skip(buf, header);
                    submit
                };
                // Serial numbers (RFC 1982): they may wrap after four billion requests.
                if (stream.wrapping_sub(*last_stream) as i32) <= 0 {
                    return Err(Ended::StreamNumber {
                        stream,
                        last: *last_stream,
                    });
                }
                *last_stream = stream;
                handler.submit(connection, stream, request);
                continue;
            }
            let bytes = payload(buf, header);
            match header.kind {
                Some(Kind::Cancel) => handler.cancel(connection, frame::cancel(bytes)?),
                Some(Kind::Ping) => {
                    let number = frame::beat(Kind::Ping, bytes)?;
                    connection.control(|sending| sending.pong = Some(number));
                }
                Some(Kind::BlobRequest) => {
                    let (number, hash) = frame::blob_request(bytes)?;
                    let rest = handler.blob(&hash);
                    if rest.is_none() {
                        warn!(peer = %connection.peer, %hash, "asked for a blob that is not here");
                    }
                    let mut sending = connection.state.lock();
                    if sending.blobs.len() >= MAX_BLOBS {
                        return Err(Ended::TooManyBlobs);
                    }
                    // Driven by this task when it is done reading.
                    sending.blobs.push_back(BlobAnswer { number, rest });
                }
                // A Submit was handled above.
                Some(
                    kind @ (Kind::Hello
                    | Kind::Submit
                    | Kind::Welcome
                    | Kind::Reject
                    | Kind::Step
                    | Kind::Pong
                    | Kind::Draining
                    | Kind::Blob),
                ) => return Err(FrameError::Unexpected { kind }.into()),
                None => debug!(peer = %connection.peer, "skipped a frame of an unknown kind"),
            }
            skip(buf, header);
        }
        Ok(())
    }
}

fn payload(buf: &BytesMut, header: frame::Header) -> &[u8] {
    &buf[frame::HEADER..frame::HEADER + header.payload]
}

fn skip(buf: &mut BytesMut, header: frame::Header) {
    bytes::Buf::advance(buf, frame::HEADER + header.payload);
}
