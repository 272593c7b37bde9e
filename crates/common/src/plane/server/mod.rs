//! The worker's end: accepts processors, reads their requests, sends them steps.
//!
//! How that is done is the plane's; this is what a worker sees of it.

mod connection;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

pub use connection::Connection;
pub(super) use connection::Outlet;

use super::{
    Address, DEAD_AFTER, PING_EVERY, http,
    net::{self, Listen},
    tcp::{self, frame},
    tls::TlsListener,
};
use crate::{
    Code,
    drain::Drain,
    ids::{BlobHash, WorkerId},
    proto::worker::GenerateRequest,
    tls::{self, TlsError},
};

/// How a worker listens.
#[derive(Clone)]
pub struct ServerConfig {
    /// Who answers here.
    pub worker: WorkerId,
    /// The shared secret that peers must present; absent: anybody may connect.
    pub token: Option<String>,
    /// What peers are shown, and asked for, in TLS. Absent: nothing is encrypted.
    pub tls: Option<tls::Files>,
    /// The largest frame that is read; default [`frame::MAX_FRAME`].
    pub max_frame: usize,
    /// Bytes of merged deltas that may wait for one peer before its connection is ended as stuck;
    /// default 256 MiB.
    pub max_backlog: usize,
    /// A peer not heard of for this long is dead; default [`DEAD_AFTER`].
    pub dead_after: Duration,
    /// How often a watcher on the http plane hears that the worker lives; default [`PING_EVERY`].
    pub beat_every: Duration,
}

impl ServerConfig {
    /// Returns the defaults, open to anybody.
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            token: None,
            tls: None,
            max_frame: frame::MAX_FRAME,
            max_backlog: 256 << 20,
            dead_after: DEAD_AFTER,
            beat_every: PING_EVERY,
        }
    }

    /// Says whether a peer may come in.
    ///
    /// - `token`: what it presents; empty: nothing.
    /// - `worker`: whom it means; empty: anybody.
    pub(super) fn admit(&self, token: &[u8], worker: &str) -> Result<(), (Code, String)> {
        if let Some(secret) = &self.token {
            // Comparing hashes takes the same time wherever the difference is.
            if blake3::hash(secret.as_bytes()) != blake3::hash(token) {
                let message = "the worker asks for a token, and none or a wrong one was given";
                return Err((Code::Unauthenticated, message.to_owned()));
            }
        }
        if !worker.is_empty() && worker != self.worker.0 {
            let message = format!("worker {} is here, not {worker}", self.worker);
            return Err((Code::NotFound, message));
        }
        Ok(())
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

    /// Says whether requests can be served now, for those who ask for the worker's health.
    fn is_ready(&self) -> bool {
        true
    }

    /// Returns a file by its content.
    fn blob(&self, hash: &BlobHash) -> Option<Bytes>;
}

/// Why a listener cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What is spoken on a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speech {
    Frames,
    Grpc,
}

/// A bound listener that does not serve yet.
pub struct Server {
    speech: Speech,
    listener: Arc<dyn Listen>,
    config: ServerConfig,
}

impl Server {
    /// Binds the tcp plane; port 0 takes any. Peers that connect now wait until
    /// [`spawn`](Self::spawn).
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(address: SocketAddr, config: ServerConfig) -> Result<Self, BindError> {
        let listener = listen(address, config.tls.as_ref(), &[])?;
        Ok(Self::on(listener, config))
    }

    /// Binds the http plane in the same way.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_http(address: SocketAddr, config: ServerConfig) -> Result<Self, BindError> {
        Ok(Self {
            speech: Speech::Grpc,
            listener: listen(address, config.tls.as_ref(), &["h2"])?,
            config,
        })
    }

    /// Serves frames, as on the tcp plane, on a listener of another kind.
    pub fn on(listener: Arc<dyn Listen>, config: ServerConfig) -> Self {
        Self {
            speech: Speech::Frames,
            listener,
            config,
        }
    }

    /// Returns the bound address, with the real port.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn address(&self) -> io::Result<Address> {
        let address = self.listener.address()?;
        Ok(match (self.speech, address) {
            (Speech::Grpc, Address::Tcp(place)) => Address::Http(place),
            (Speech::Grpc, Address::Tls(place)) => Address::Https(place),
            (_, address) => address,
        })
    }

    /// Accepts from now on, in a task of its own. When `drain` says so, peers are told that nothing new is
    /// taken; that new requests are refused is the handler's part.
    pub fn spawn(self, handler: Arc<impl Handler>, drain: Drain) -> ServerHandle {
        let stop = CancellationToken::new();
        let (listener, config, stopped) = (self.listener, self.config, stop.clone());
        let task = match self.speech {
            Speech::Frames => tokio::spawn(tcp::server::serve(
                listener, config, handler, drain, stopped,
            )),
            Speech::Grpc => tokio::spawn(http::server::serve(
                listener, config, handler, drain, stopped,
            )),
        };
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

fn listen(
    address: SocketAddr,
    tls: Option<&tls::Files>,
    speech: &'static [&'static str],
) -> Result<Arc<dyn Listen>, BindError> {
    // The files first: a port that is bound and then let go has kept peers waiting.
    let tls = tls.map(|files| tls::Server::load(files.clone(), speech));
    let tls = tls.transpose()?;
    let listener = net::listen(address).map_err(|source| BindError::Listen { address, source })?;
    Ok(match tls {
        Some(tls) => Arc::new(TlsListener::new(listener, tls)),
        None => Arc::new(listener),
    })
}
