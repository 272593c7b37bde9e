//! What leaves a pipe, numbered.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use async_nats::{Client, Subject, message::OutboundMessage};
use futures::Sink;

use super::{super::wire::Packet, cost};

/// What leaves.
pub(super) struct Outbox {
    pub(super) client: Client,
    pub(super) to: Subject,
    /// Where the peer sends to; the server answers there if the peer is gone.
    pub(super) from: Subject,
    pub(super) number: u64,
    /// How much of the peer's window was used, ever.
    pub(super) sent: u64,
    /// The latest `read` that the peer was told.
    pub(super) told: u64,
    pub(super) closed: bool,
}

/// What a message is for.
#[derive(Clone, Copy)]
pub(super) enum Kind<'a> {
    Data(&'a [u8]),
    /// Tells what was read, and nothing else.
    Read,
    /// Asks for the peer: the server answers if there is none.
    Probe,
    Close,
}

impl Outbox {
    /// Sends a message, if the library takes one. It takes it whole.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        read: &AtomicU64,
        kind: Kind<'_>,
    ) -> Poll<io::Result<()>> {
        let mut client = Pin::new(&mut self.client);
        ready!(client.as_mut().poll_ready(cx)).map_err(io::Error::other)?;
        let read = read.load(Ordering::Relaxed);
        let (data, last) = match kind {
            Kind::Data(data) => (data, false),
            Kind::Read | Kind::Probe => (&[][..], false),
            Kind::Close => (&[][..], true),
        };
        let message = OutboundMessage {
            subject: self.to.clone(),
            reply: matches!(kind, Kind::Probe).then(|| self.from.clone()),
            payload: Packet::encode(last, self.number, read, data),
            headers: None,
        };
        client.start_send(message).map_err(io::Error::other)?;
        self.number += 1;
        if !data.is_empty() {
            self.sent += cost(data.len());
        }
        self.told = read;
        self.closed |= last;
        Poll::Ready(Ok(()))
    }
}
