//! Byte streams over TLS, where a plane asks for it.

use std::{io, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Mutex,
    task::JoinSet,
    time,
};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::{
    Address,
    net::{self, Dial, Io, Listen},
};
use crate::tls;

/// What a peer has to shake hands: as long as it has for its first word.
const SHAKE_WITHIN: Duration = Duration::from_secs(5);

/// Handshakes at once; beyond, peers wait to be accepted.
const MAX_SHAKING: usize = 1024;

/// Dials TCP and shakes hands.
pub(super) struct TlsDial {
    pub(super) tls: Arc<tls::Client>,
    /// What is to be spoken (ALPN); empty: frames.
    pub(super) speech: &'static [&'static str],
}

#[async_trait]
impl Dial for TlsDial {
    async fn dial(&self, place: &str) -> io::Result<Io> {
        let host = place.rsplit_once(':').map_or(place, |(host, _)| host);
        let name = self
            .tls
            .name(host.trim_matches(['[', ']']))
            .map_err(io::Error::other)?;
        let stream = net::connect(place).await?;
        let connector = self.tls.connector(self.speech);
        Ok(split(connector.connect(name, stream).await?))
    }
}

/// Accepts TCP and shakes hands, with many at once: one that dawdles holds up nobody.
pub(super) struct TlsListener {
    listener: TcpListener,
    tls: tls::Server,
    shaking: Mutex<JoinSet<(String, io::Result<Io>)>>,
    _watch: AbortOnDropHandle<()>,
}

impl TlsListener {
    /// Shakes hands on a bound listener.
    pub(super) fn new(listener: TcpListener, tls: tls::Server) -> Self {
        Self {
            listener,
            _watch: AbortOnDropHandle::new(tokio::spawn(tls.watch())),
            tls,
            shaking: Mutex::default(),
        }
    }
}

#[async_trait]
impl Listen for TlsListener {
    async fn accept(&self) -> io::Result<(Io, String)> {
        let mut shaking = self.shaking.lock().await;
        loop {
            tokio::select! {
                Some(Ok((peer, shaken))) = shaking.join_next() => match shaken {
                    Ok(io) => return Ok((io, peer)),
                    Err(error) => warn!(peer, %error, "no TLS with a peer"),
                },
                accepted = net::accept(&self.listener), if shaking.len() < MAX_SHAKING => {
                    let (stream, peer) = accepted?;
                    let acceptor = self.tls.acceptor();
                    shaking.spawn(async move {
                        let shaken = time::timeout(SHAKE_WITHIN, acceptor.accept(stream)).await;
                        let shaken = shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                        (peer.to_string(), shaken.map(split))
                    });
                }
            }
        }
    }

    fn address(&self) -> io::Result<Address> {
        Ok(Address::Tls(self.listener.local_addr()?.to_string()))
    }
}

fn split(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Io {
    let (reader, writer) = tokio::io::split(stream);
    Io {
        reader: Box::pin(reader),
        writer: Box::pin(writer),
    }
}
