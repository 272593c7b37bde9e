//! Accepts connections and lets go of them at the end.
//!
//! An own loop instead of `axum::serve`, which has no time-outs, no TLS, and leaves Nagle's algorithm on: a
//! streamed token would wait for the acknowledgement of the one before, 40 ms on Linux.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{SockRef, TcpKeepalive};
use stator_common::drain::Drain;
use stator_common::tls::Server;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::BindError;
use super::connection::Connections;
use super::tls;
use crate::App;
use crate::config::Config;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// Pause after the system had no room for a connection (no free file descriptor, say), which would
/// otherwise be asked for again in a tight loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A client that vanished without a word is noticed after about a minute, so that its engine slot is freed
/// although nothing is written to it (a long prefill, an answer that is not streamed).
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// A taken port.
pub(super) struct Listener {
    socket: TcpListener,
    addr: SocketAddr,
    tls: Option<Server>,
}

impl Listener {
    /// Takes the configured port.
    pub(super) async fn bind(config: &Config) -> Result<Self, BindError> {
        let tls = tls::load(config)?;
        let (socket, addr) = bind(&config.http_host, config.http_port).await?;
        Ok(Self { socket, addr, tls })
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves connections until draining, then waits for those that are open.
    pub(super) async fn serve(self, app: Arc<App>, router: axum::Router, drain: Drain) {
        let connections = Connections::new(app, router, drain.clone());
        let tasks = TaskTracker::new();
        let watch = self.tls.as_ref().map(Server::watch);
        let mut watch = std::pin::pin!(async move {
            match watch {
                Some(watch) => watch.await,
                None => std::future::pending().await,
            }
        });
        let mut draining = std::pin::pin!(drain.draining());
        loop {
            tokio::select! {
                () = &mut draining => break,
                () = &mut watch => {}
                accepted = self.socket.accept() => match accepted {
                    Ok((stream, peer)) => {
                        prepare(&stream, peer);
                        let connection = connections.open(stream, self.tls.as_ref().map(Server::acceptor));
                        tasks.spawn(connection);
                    }
                    Err(error) if is_the_connections_own(&error) => debug!(%error, "accept"),
                    Err(error) => {
                        warn!(%error, "cannot accept connections");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        // From here on the port refuses connections, so that others are tried at once.
        drop(self.socket);
        tasks.close();
        tasks.wait().await;
    }
}

/// Takes the port `port` of the first address that `host` means; 0 takes a free one.
pub(super) async fn bind(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), BindError> {
    let resolve = |source| BindError::Resolve {
        host: host.to_owned(),
        source,
    };
    let wanted = tokio::net::lookup_host((host, port))
        .await
        .map_err(resolve)?
        .next()
        .ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))?;
    let listen = |source| BindError::Listen {
        addr: wanted,
        source,
    };
    let socket = listen_on(wanted).map_err(listen)?;
    let addr = socket.local_addr().map_err(listen)?;
    Ok((socket, addr))
}

fn listen_on(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

fn prepare(stream: &TcpStream, peer: SocketAddr) {
    let (idle, interval) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval);
    let set = stream
        .set_nodelay(true)
        .and_then(|()| SockRef::from(stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = set {
        debug!(%peer, %error, "set socket options");
    }
}

/// Raises the process's soft limit of open files to the hard one: every connection is a file, and the
/// customary soft limit is 1024.
pub(super) fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        debug!(%error, "raise the limit of open files");
    }
}

/// Says whether an error of `accept` concerns only the connection that was to be accepted.
fn is_the_connections_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
