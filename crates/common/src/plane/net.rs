//! Where the plane's byte streams come from: the only place that makes a TCP socket.
//!
//! Everything above works on boxed halves, so that whatever carries bytes in order, both ways, can carry
//! the plane's frames: a [`Dial`] and a [`Listen`] are all that takes.

use std::{io, net::SocketAddr, pin::Pin};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket, TcpStream},
};

use super::Address;

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
    /// Opens a connection to `place`, the [`Address::place`] of an address of this kind.
    async fn dial(&self, place: &str) -> io::Result<Io>;
}

/// Accepts. Implementations must make `accept` cancel safe.
#[async_trait]
pub trait Listen: Send + Sync + 'static {
    /// Waits for the next connection. Returns also who it is from, for logs.
    async fn accept(&self) -> io::Result<(Io, String)>;

    /// Returns the address that was bound, with the real port.
    fn address(&self) -> io::Result<Address>;
}

/// The operating system's TCP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

#[async_trait]
impl Dial for Tcp {
    async fn dial(&self, place: &str) -> io::Result<Io> {
        Ok(split(connect(place).await?))
    }
}

#[async_trait]
impl Listen for TcpListener {
    async fn accept(&self) -> io::Result<(Io, String)> {
        let (stream, peer) = accept(self).await?;
        Ok((split(stream), peer.to_string()))
    }

    fn address(&self) -> io::Result<Address> {
        Ok(Address::Tcp(self.local_addr()?.to_string()))
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

// A step is one small write that nothing follows: Nagle's algorithm would hold it back for the
// peer's delayed acknowledgement, up to 40 ms. So every socket has TCP_NODELAY.

pub(super) async fn connect(place: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(place).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

pub(super) async fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, peer))
}

fn split(stream: TcpStream) -> Io {
    let (reader, writer) = stream.into_split();
    Io {
        reader: Box::pin(reader),
        writer: Box::pin(writer),
    }
}
