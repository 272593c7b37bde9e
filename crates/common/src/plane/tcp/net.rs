//! Where the plane's byte streams come from: the only place that makes a TCP socket.
//!
//! Everything above works on boxed halves, so that a simulated network or TLS can stand in.

use std::{io, net::SocketAddr, pin::Pin};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket, TcpStream},
};

/// Connections that may wait to be accepted: every processor of a large deployment may
/// reconnect at once.
const BACKLOG: u32 = 1024;

/// The way in of a connection.
pub type Reader = Pin<Box<dyn AsyncRead + Send>>;
/// The way out of a connection.
pub type Writer = Pin<Box<dyn AsyncWrite + Send>>;

/// Both ways of a connection.
pub struct Io {
    pub reader: Reader,
    pub writer: Writer,
}

/// Dials.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Opens a connection to `address` (`host:port`).
    async fn dial(&self, address: &str) -> io::Result<Io>;
}

/// Accepts. Implementations must make `accept` cancel safe.
#[async_trait]
pub trait Listen: Send + Sync + 'static {
    /// Waits for the next connection.
    async fn accept(&self) -> io::Result<(Io, SocketAddr)>;

    /// Returns the address that was bound, with the real port.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// The operating system's TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

#[async_trait]
impl Dial for Tcp {
    async fn dial(&self, address: &str) -> io::Result<Io> {
        split(TcpStream::connect(address).await?)
    }
}

#[async_trait]
impl Listen for TcpListener {
    async fn accept(&self) -> io::Result<(Io, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        Ok((split(stream)?, peer))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        TcpListener::local_addr(self)
    }
}

/// Binds a listening socket; port 0 takes any.
///
/// # Errors
/// Those of the operating system.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A worker that restarts takes its port back at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn split(stream: TcpStream) -> io::Result<Io> {
    // A step is one small write that nothing follows: Nagle's algorithm would hold it back for
    // the peer's delayed acknowledgement, up to 40 ms.
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    Ok(Io {
        reader: Box::pin(reader),
        writer: Box::pin(writer),
    })
}
