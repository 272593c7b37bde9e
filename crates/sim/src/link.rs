//! The engine's two sockets to one frontend: requests come in on a DEALER, outputs go out on a PUSH.
//!
//! An engine connects, a frontend binds. When the frontend goes away, outputs wait here, and both sockets are connected
//! again, without another handshake, as soon as somebody binds the endpoints. libzmq does that by itself; the `zeromq` crate does not reconnect these
//! kinds of sockets, and a PUSH of it does not notice that its peer is gone, so the DEALER's
//! end is taken for both.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tracing::{debug, info};
use zeromq::{
    DealerSocket, PushSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend,
    ZmqMessage,
};

/// How long one attempt to connect may take. Attempts start over, so that the crate's growing
/// pauses between tries stay short: a frontend that comes back is found within half a second.
const CONNECT_ATTEMPT: Duration = Duration::from_millis(700);

/// The endpoints of one frontend.
#[derive(Clone, Debug)]
pub struct Link {
    pub input: String,
    pub output: String,
    /// Two bytes, the rank in little-endian order.
    pub identity: [u8; 2],
}

impl Link {
    /// Joins a frontend until the engine lets go of `outputs`.
    ///
    /// `hello` is the first message on the input socket; it is not repeated. Messages from the frontend go to
    /// `deliver`.
    pub async fn run(
        self,
        hello: Bytes,
        mut outputs: mpsc::UnboundedReceiver<Vec<Bytes>>,
        mut deliver: impl FnMut(Vec<Bytes>),
    ) {
        let mut hello = Some(hello);
        let mut unsent: Option<ZmqMessage> = None;
        loop {
            let mut dealer = dealer(self.identity);
            connect(&mut dealer, &self.input).await;
            let mut events = dealer.monitor();
            if let Some(hello) = hello.take()
                && dealer.send(ZmqMessage::from(hello)).await.is_err()
            {
                continue;
            }
            let mut push = PushSocket::with_options(options());
            connect(&mut push, &self.output).await;
            info!(input = self.input, "connected to the frontend");
            loop {
                if let Some(message) = unsent.take()
                    && push.send(message.clone()).await.is_err()
                {
                    unsent = Some(message);
                    break;
                }
                tokio::select! {
                    biased;
                    event = events.next() => {
                        if matches!(event, Some(SocketEvent::Disconnected(_)) | None) {
                            break;
                        }
                    }
                    message = dealer.recv() => match message {
                        Ok(message) => deliver(message.into_vec()),
                        Err(error) => {
                            debug!(%error, "input socket");
                            break;
                        }
                    },
                    frames = outputs.recv() => match frames {
                        Some(frames) => unsent = ZmqMessage::try_from(frames).ok(),
                        None => return,
                    },
                }
            }
            info!(
                input = self.input,
                "frontend is gone; waiting for it to come back"
            );
        }
    }
}

/// A DEALER that bears an engine's identity.
#[must_use]
pub fn dealer(identity: [u8; 2]) -> DealerSocket {
    let mut options = options();
    if let Ok(identity) = Bytes::copy_from_slice(&identity).try_into() {
        options.peer_identity(identity);
    }
    DealerSocket::with_options(options)
}

/// Connects, however long it takes.
pub async fn connect(socket: &mut impl Socket, endpoint: &str) {
    while let Err(error) = socket.connect(endpoint).await {
        debug!(endpoint, %error, "connect");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT_ATTEMPT);
    options
}
