//! The engine's start-up handshake, our side of it.
//!
//! 1. The engine says HELLO to the handshake ROUTER.
//! 2. We answer with the addresses of the two sockets that it shall connect to.
//! 3. It loads the model, and sends its ready response to the request ROUTER.
//! 4. It says READY on the handshake ROUTER.
//!
//! vLLM 0.23 to 0.33 agree (`vllm/v1/engine/core.py`, `startup_handshake`). One engine is led through
//! one handshake; the socket is closed after it, so that an engine that starts later waits in its own
//! queue until somebody listens for it.

use std::net::SocketAddr;

use bytes::Bytes;
use tracing::{debug, info, warn};
use zeromq::{RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use crate::{
    error::StartError,
    lockstep::Lockstep,
    rundir::{Endpoints, Pair},
    sockets::Incoming,
    wire::{self, Ready, Status, WireError},
};

/// The bound handshake socket.
pub(crate) struct Handshake {
    router: RouterSocket,
    addr: SocketAddr,
}

/// An engine that is ready.
#[derive(Debug)]
pub(crate) struct Greeted {
    /// Its ZMQ identity.
    pub(crate) identity: Bytes,
    pub(crate) ready: Ready,
}

/// Why a handshake broke off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeadError {
    #[error(transparent)]
    Socket(#[from] ZmqError),
    #[error("the engine's ready response cannot be read: {0}")]
    ReadyResponse(WireError),
}

impl Handshake {
    /// Listens on `address` (`host:port`; port 0 takes a free one).
    pub(crate) async fn bind(address: &str) -> Result<Self, StartError> {
        let listen = |source| StartError::Listen {
            address: address.to_owned(),
            source,
        };
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .and_then(tokio::net::TcpListener::into_std)
            .map_err(|error| listen(ZmqError::from(error)))?;
        let addr = listener
            .local_addr()
            .map_err(|error| listen(error.into()))?;
        let mut router = RouterSocket::new();
        router.bind_listener(listener).await.map_err(listen)?;
        Ok(Self { router, addr })
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Leads one engine through, from its HELLO to its READY.
    ///
    /// What makes no sense is logged and passed over: a stranger that knocks must not cost a start.
    ///
    /// - `greeted`: called when the engine has said HELLO.
    pub(crate) async fn lead(
        &mut self,
        endpoints: &Endpoints,
        lockstep: Option<&Lockstep>,
        incoming: &mut Incoming,
        mut greeted: impl FnMut(),
    ) -> Result<Greeted, LeadError> {
        let Pair { input, output } = endpoints.advertised.clone();
        let init = wire::encode_init_of(&[input], &[output], lockstep);
        let mut engine: Option<Bytes> = None;
        let mut response: Option<Ready> = None;
        let mut said_ready = false;
        loop {
            tokio::select! {
                message = self.router.recv() => {
                    let Some((identity, payload)) = two_frames(message?) else { continue };
                    match wire::decode_handshake(&payload).map(|message| message.status) {
                        Ok(Status::Hello) => {
                            if engine.as_ref().is_some_and(|engine| *engine != identity) {
                                warn!(?identity, "a second engine dialled in; it is left waiting");
                                continue;
                            }
                            info!(?identity, "engine dialled in");
                            let mut answer = ZmqMessage::from(identity.clone());
                            answer.push_back(init.clone());
                            if let Err(error) = self.router.send(answer).await {
                                warn!(%error, "engine left during its handshake");
                                continue;
                            }
                            engine = Some(identity);
                            (response, said_ready) = (None, false);
                            greeted();
                        }
                        Ok(Status::Ready) if engine.as_ref() == Some(&identity) => {
                            said_ready = true;
                        }
                        Ok(status) => warn!(?status, ?identity, "out of turn in the handshake"),
                        Err(error) => warn!(%error, "not a handshake message"),
                    }
                }
                message = incoming.recv() => {
                    let Some((identity, payload)) = two_frames(message?) else { continue };
                    if engine.as_ref() != Some(&identity) {
                        debug!(?identity, "a message of another engine");
                        continue;
                    }
                    match wire::decode_ready(&payload) {
                        Ok(ready) => response = Some(ready),
                        Err(error) => return Err(LeadError::ReadyResponse(error)),
                    }
                }
            }
            if let (Some(identity), Some(ready), true) = (&engine, &response, said_ready) {
                return Ok(Greeted {
                    identity: identity.clone(),
                    ready: ready.clone(),
                });
            }
        }
    }

    /// Closes the socket, and waits until its port is free.
    pub(crate) async fn close(self) {
        self.router.close().await;
    }
}

fn two_frames(message: ZmqMessage) -> Option<(Bytes, Bytes)> {
    let mut frames = message.into_vec().into_iter();
    let pair = (frames.next()?, frames.next()?);
    if frames.next().is_some() {
        warn!("a handshake message of more than two frames");
        return None;
    }
    Some(pair)
}
