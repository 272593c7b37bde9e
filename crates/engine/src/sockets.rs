//! The two ZMQ sockets of an engine: a ROUTER that requests leave by, a PULL that outputs come by.
//!
//! We bind and the engine connects, which is what makes adoption possible: whoever binds the same
//! addresses again gets the engine's connections within its redial interval of 100 ms.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use bytes::Bytes;
use futures::{FutureExt, channel::mpsc};
use zeromq::{
    PullSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketEvent, SocketOptions,
    SocketRecv, SocketSend, ZmqError, ZmqMessage,
};

use crate::rundir::{Endpoints, Pair};

/// `sockaddr_un.sun_path` holds 108 bytes, one of them the terminating zero.
const MAX_UNIX_PATH: usize = 107;

/// Bound sockets.
pub(crate) struct Sockets {
    pub(crate) endpoints: Endpoints,
    pub(crate) requests: RouterSocket,
    /// Engines that dial in to `requests`, and go.
    pub(crate) events: mpsc::Receiver<SocketEvent>,
    pub(crate) outputs: Outputs,
}

/// Bound sockets that send and receive on their own.
pub(crate) struct Wires {
    pub(crate) endpoints: Endpoints,
    pub(crate) requests: RouterSendHalf,
    pub(crate) incoming: Incoming,
    pub(crate) events: mpsc::Receiver<SocketEvent>,
    pub(crate) outputs: Outputs,
}

/// The PULL socket.
///
/// The library lets the connections of a PULL live on when it is dropped: the engine would go on
/// sending into them, and never dial the next socket at this address. This one closes them.
pub(crate) struct Outputs(PullSocket);

impl Outputs {
    /// Receives the frames of the next message. Cancel safe.
    ///
    /// # Errors
    /// What one connection sent is no ZMTP; the others go on.
    pub(crate) async fn recv(&mut self) -> Result<Vec<Bytes>, ZmqError> {
        self.0.recv().await.map(ZmqMessage::into_vec)
    }

    /// Closes the socket, and waits until its address is free.
    pub(crate) async fn close(&mut self) {
        self.0.backend().shutdown();
        self.0.unbind_all().await;
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        self.0.backend().shutdown();
    }
}

/// The receiving half of the ROUTER: the ready response at the start, and after that only the notice
/// that the engine is gone, which the library gives only while somebody receives.
pub(crate) type Incoming = RouterRecvHalf;

/// Where new sockets are bound.
pub(crate) enum Place<'a> {
    /// In a directory; on a loopback port where its path is too long for a socket.
    Local(&'a Path),
    /// On a free port of `bind`; the engine is told `advertise`.
    Network { bind: IpAddr, advertise: &'a str },
    /// Where they were.
    Again(&'a Endpoints),
}

impl Sockets {
    /// Binds both.
    pub(crate) async fn bind(place: Place<'_>) -> Result<Self, ZmqError> {
        let (bind, advertise) = match place {
            Place::Again(endpoints) => (endpoints.bind.clone(), None),
            Place::Network { bind, advertise } => (free_ports(bind), Some(advertise)),
            Place::Local(dir) => (local(dir), None),
        };
        let mut requests = RouterSocket::new();
        let events = requests.monitor();
        // One step of 64 streams is about 6 kB; the buffer grows by itself beyond.
        let mut options = SocketOptions::default();
        options.read_buffer(4096, 256 << 10, 8);
        let mut outputs = PullSocket::with_options(options);
        let bound = Pair {
            input: bind_one(&mut requests, &bind.input).await?,
            output: bind_one(&mut outputs, &bind.output).await?,
        };
        let advertised = match (place, advertise) {
            (Place::Again(endpoints), _) => endpoints.advertised.clone(),
            (_, Some(host)) => Pair {
                input: with_host(&bound.input, host),
                output: with_host(&bound.output, host),
            },
            (_, None) => bound.clone(),
        };
        let endpoints = Endpoints {
            bind: bound,
            advertised,
        };
        Ok(Self {
            endpoints,
            requests,
            events,
            outputs: Outputs(outputs),
        })
    }

    pub(crate) fn split(self) -> Wires {
        let Self {
            endpoints,
            requests,
            events,
            outputs,
        } = self;
        let (requests, incoming) = requests.split();
        Wires {
            endpoints,
            requests,
            incoming,
            events,
            outputs,
        }
    }

    /// Closes both, and waits until their addresses are free again.
    #[cfg(test)]
    pub(crate) async fn close(mut self) {
        self.requests.close().await;
        self.outputs.close().await;
    }
}

impl Clone for Place<'_> {
    fn clone(&self) -> Self {
        *self
    }
}

impl Copy for Place<'_> {}

/// Every engine gets names of its own: the library removes a closed socket's file a moment later, and
/// must not remove the next one's.
fn local(dir: &Path) -> Pair {
    static BINDS: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "{}-{}",
        std::process::id(),
        BINDS.fetch_add(1, Ordering::Relaxed)
    );
    let (input, output) = (
        dir.join(format!("{name}.in")),
        dir.join(format!("{name}.out")),
    );
    let fits = output.as_os_str().as_bytes().len() <= MAX_UNIX_PATH;
    match (input.to_str(), output.to_str()) {
        (Some(input), Some(output)) if fits => Pair {
            input: format!("ipc://{input}"),
            output: format!("ipc://{output}"),
        },
        _ => free_ports(Ipv4Addr::LOCALHOST.into()),
    }
}

fn free_ports(host: IpAddr) -> Pair {
    let any = match host {
        IpAddr::V4(host) => format!("tcp://{host}:0"),
        IpAddr::V6(host) => format!("tcp://[{host}]:0"),
    };
    Pair {
        input: any.clone(),
        output: any,
    }
}

fn with_host(endpoint: &str, host: &str) -> String {
    let port = endpoint.rsplit(':').next().unwrap_or_default();
    if host.contains(':') && !host.starts_with('[') {
        format!("tcp://[{host}]:{port}")
    } else {
        format!("tcp://{host}:{port}")
    }
}

async fn bind_one(socket: &mut impl Socket, endpoint: &str) -> Result<String, ZmqError> {
    if let Some(path) = endpoint.strip_prefix("ipc://") {
        remove_stale(Path::new(path))?;
    }
    Ok(socket.bind(endpoint).await?.to_string())
}

/// Removes a socket file that a killed worker left behind; one that somebody listens on is an error.
fn remove_stale(path: &Path) -> io::Result<()> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Sends to one engine, from any thread, in order.
#[derive(Clone)]
pub(crate) struct Sender {
    half: RouterSendHalf,
    identity: Bytes,
}

/// A message did not leave: the engine is not connected, or does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// The engine is not connected (what libzmq calls EHOSTUNREACH).
    #[error("the engine is not connected")]
    Unroutable,
    /// A hundred thousand messages wait for the engine already.
    #[error("the engine does not read its requests")]
    Full,
}

impl Sender {
    pub(crate) fn new(half: RouterSendHalf, identity: Bytes) -> Self {
        Self { half, identity }
    }

    /// Puts a message into the engine's queue. What one thread sends arrives in order, and what is
    /// sent after another send returned arrives after it.
    ///
    /// Never waits: the library's send only does so when its queue is full.
    pub(crate) fn send(&self, kind: &'static [u8], payload: Bytes) -> Result<(), Unsent> {
        let mut message = ZmqMessage::from(payload);
        message.push_front(Bytes::from_static(kind));
        message.push_front(self.identity.clone());
        match self.half.clone().send(message).now_or_never() {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) => Err(Unsent::Unroutable),
            None => Err(Unsent::Full),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_a_long_path_gets_loopback_ports() {
        assert!(
            local(Path::new("/run/x"))
                .input
                .starts_with("ipc:///run/x/")
        );
        let long = format!("/{}", "x".repeat(105));
        assert_eq!(local(Path::new(&long)).output, "tcp://127.0.0.1:0");
    }

    #[test]
    fn the_engine_is_told_the_advertised_host() {
        assert_eq!(
            with_host("tcp://0.0.0.0:4000", "10.0.0.7"),
            "tcp://10.0.0.7:4000"
        );
        assert_eq!(
            with_host("tcp://[::]:4000", "fd00::1"),
            "tcp://[fd00::1]:4000"
        );
    }

    #[tokio::test]
    async fn a_socket_file_left_behind_is_taken_over_but_not_one_in_use() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("in.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        assert!(path.exists());
        let sockets = Sockets::bind(Place::Local(dir.path())).await.expect("bind");
        assert!(
            Sockets::bind(Place::Again(&sockets.endpoints))
                .await
                .is_err()
        );
        let endpoints = sockets.endpoints.clone();
        sockets.close().await;
        Sockets::bind(Place::Again(&endpoints))
            .await
            .expect("bind again");
    }

    #[tokio::test]
    async fn sending_to_an_engine_that_is_not_there_fails_at_once() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let sockets = Sockets::bind(Place::Local(dir.path())).await.expect("bind");
        let (half, _incoming) = sockets.requests.split();
        let sender = Sender::new(half, Bytes::from_static(&[0, 0]));
        assert_eq!(sender.send(b"\x00", Bytes::new()), Err(Unsent::Unroutable));
    }
}
