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
    Address, DEAD_AFTER,
    net::{self, Listen},
    tcp::{self, frame},
};
use crate::{
    drain::Drain,
    ids::{BlobHash, WorkerId},
    proto::worker::GenerateRequest,
};

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
        Ok(Self::on(Arc::new(net::listen(address)?), config))
    }

    /// Serves frames on a listener of another kind.
    pub fn on(listener: Arc<dyn Listen>, config: ServerConfig) -> Self {
        Self { listener, config }
    }

    /// Returns the bound address, with the real port.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn address(&self) -> io::Result<Address> {
        self.listener.address()
    }

    /// Accepts from now on, in a task of its own. When `drain` says so, peers are told that nothing new is
    /// taken; that new requests are refused is the handler's part.
    pub fn spawn(self, handler: Arc<impl Handler>, drain: Drain) -> ServerHandle {
        let stop = CancellationToken::new();
        let Self { listener, config } = self;
        let task = tokio::spawn(tcp::server::serve(
            listener,
            config,
            handler,
            drain,
            stop.clone(),
        ));
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
