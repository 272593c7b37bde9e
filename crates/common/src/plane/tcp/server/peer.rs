//! The task of one connection: greets, reads, and writes what others could not.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures::future::poll_fn;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::outlet::{MAX_BLOBS, Outlet};
use crate::{
    Code,
    drain::Drain,
    plane::{
        SOFTWARE, error,
        net::Io,
        server::{Connection, Handler, ServerConfig},
        tcp::{
            frame::{self, FrameError, Kind},
            inbound::{Inbound, Lost},
            outbound::Outbound,
        },
    },
    proto::plane,
};

/// Prompts from this size on share memory with the read buffer instead of being copied.
const ZERO_COPY_FROM: usize = 8 << 10;

/// A peer that does not introduce itself within this time is no processor.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// What a closing server gives its peers to take what was written.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the server closes")]
    Stopped,
    #[error("closed by this side")]
    ByUs,
    #[error("no Hello within {} s", HELLO_WITHIN.as_secs())]
    NoHello,
    #[error("refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Lost(#[from] Lost),
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
pub(super) struct Peer {
    /// Who it is, for logs.
    pub(super) address: String,
    pub(super) config: Arc<ServerConfig>,
    pub(super) drain: Drain,
    pub(super) stop: CancellationToken,
}

impl Peer {
    pub(super) async fn run(self, io: Io, handler: Arc<impl Handler>) {
        let Io { reader, writer } = io;
        let mut inbound = Inbound::new(reader);
        let outlet = Arc::new(Outlet::new(
            self.address.clone(),
            Outbound::new(writer),
            self.config.max_backlog,
        ));
        let ended = match self.greet(&outlet, &mut inbound).await {
            Err(ended) => ended,
            Ok(software) => {
                info!(peer = %self.address, software, "processor connected");
                let connection = Arc::new(Connection::new(
                    self.address.clone(),
                    outlet.clone(),
                    outlet.closed.clone(),
                ));
                handler.opened(&connection);
                let ended = self
                    .serve((&connection, &outlet), &mut inbound, &*handler)
                    .await;
                outlet.closed.cancel();
                handler.closed(&connection);
                ended
            }
        };
        match ended {
            Ended::Lost(Lost::ByPeer) | Ended::Stopped => {
                info!(peer = %self.address, reason = %ended, "processor gone");
            }
            _ => warn!(peer = %self.address, reason = %ended, "processor gone"),
        }
        outlet.closed.cancel();
        // A refusal or the last deltas are worth a moment; a peer that does not read them is not.
        let _ = time::timeout(FLUSH_WITHIN, poll_fn(|cx| outlet.poll_drained(cx))).await;
        outlet.release();
    }

    /// Reads the Hello and answers it. Returns what the peer calls itself.
    async fn greet(&self, outlet: &Outlet, inbound: &mut Inbound) -> Result<String, Ended> {
        let hello = inbound.first::<Ended>();
        let header = tokio::select! {
            () = self.stop.cancelled() => return Err(Ended::Stopped),
            header = time::timeout(HELLO_WITHIN, hello) => header.map_err(|_| Ended::NoHello)??,
        };
        let Some(Kind::Hello) = header.kind else {
            return Err(FrameError::NotStator.into());
        };
        let payload = frame::take(&mut inbound.buf, header);
        let peer = frame::introduction(&payload)?;
        if peer.major != frame::MAJOR {
            return Err(self.reject(
                outlet,
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
        if let Err((code, message)) = self.config.admit(&hello.token, &hello.worker) {
            return Err(self.reject(outlet, code, message));
        }
        outlet.control(|sending| {
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

    fn reject(&self, outlet: &Outlet, code: Code, message: String) -> Ended {
        outlet.control(|sending| {
            frame::put_reject(&mut sending.out.buf, &error(code, message.clone()));
        });
        Ended::Refused(message)
    }

    /// Reads until the connection ends.
    async fn serve(
        &self,
        (connection, outlet): (&Arc<Connection>, &Outlet),
        inbound: &mut Inbound,
        handler: &impl Handler,
    ) -> Ended {
        let mut check = time::interval(self.config.dead_after / 3);
        let mut told_draining = false;
        let mut last_stream = 0;
        loop {
            match self.handle(
                (connection, outlet),
                &mut inbound.buf,
                handler,
                &mut last_stream,
            ) {
                Ok(()) => {}
                Err(ended) => return ended,
            }
            tokio::select! {
                biased;
                error = poll_fn(|cx| outlet.poll_drive(cx)) => return error.into(),
                () = outlet.closed.cancelled() => return Ended::ByUs,
                () = self.stop.cancelled() => return Ended::Stopped,
                () = self.drain.draining(), if !told_draining => {
                    told_draining = true;
                    outlet.control(|sending| frame::put_draining(&mut sending.out.buf));
                }
                _ = check.tick() => {
                    if let Err(lost) = inbound.check(self.config.dead_after) {
                        return lost.into();
                    }
                }
                read = inbound.read() => if let Err(lost) = read {
                    return lost.into();
                },
            }
        }
    }

    /// Handles every frame that has arrived in full.
    fn handle(
        &self,
        (connection, outlet): (&Arc<Connection>, &Outlet),
        buf: &mut BytesMut,
        handler: &impl Handler,
        last_stream: &mut u32,
    ) -> Result<(), Ended> {
        while let Some(header) = frame::peek(buf, self.config.max_frame)? {
            if header.kind == Some(Kind::Submit) {
                let (stream, request) = if header.payload >= ZERO_COPY_FROM {
                    frame::submit(frame::take(buf, header))?
                } else {
                    let submit = frame::submit(frame::payload(buf, header))?;
                    frame::skip(buf, header);
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
            let bytes = frame::payload(buf, header);
            match header.kind {
                Some(Kind::Cancel) => handler.cancel(connection, frame::cancel(bytes)?),
                Some(Kind::Ping) => {
                    let number = frame::beat(Kind::Ping, bytes)?;
                    outlet.control(|sending| sending.pong = Some(number));
                }
                Some(Kind::BlobRequest) => {
                    let (number, hash) = frame::blob_request(bytes)?;
                    let rest = handler.blob(&hash);
                    if rest.is_none() {
                        warn!(peer = %connection.peer(), %hash, "asked for a blob that is not here");
                    }
                    if !outlet.answer_blob(number, rest) {
                        return Err(Ended::TooManyBlobs);
                    }
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
                None => debug!(peer = %connection.peer(), "skipped a frame of an unknown kind"),
            }
            frame::skip(buf, header);
        }
        Ok(())
    }
}
