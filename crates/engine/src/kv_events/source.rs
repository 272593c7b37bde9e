//! The two sockets of an engine's publisher: a SUB that hears batches, a DEALER that asks for those that were missed.
//!
//! The engine keeps its last `buffer_steps` batches (10,000 unless configured). Its replies go through a queue of
//! a thousand messages and are dropped beyond, the last one included, so a long replay has holes and may not end:
//! whoever asks goes on from what it got.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, channel::mpsc};
use zeromq::{
    DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, SubSocket, ZmqMessage,
};

/// How long a connection may take, greetings included.
const CONNECT: Duration = Duration::from_secs(3);

/// The number that ends a replay.
const END: u64 = u64::MAX;

/// Where an engine publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// PUB, as it can be connected to.
    pub events: String,
    /// ROUTER, likewise. `None`: what is missed cannot be had again.
    pub replay: Option<String>,
    pub topic: String,
}

/// A batch with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// From 0 on in each life of an engine, one by one.
    pub seq: u64,
    /// See [`decode`](super::decode).
    pub payload: Bytes,
}

/// What an engine says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A batch, as it is published.
    Live(Numbered),
    /// A batch that was asked for.
    Again(Numbered),
    /// All that was asked for has been said, as far as it is still known.
    AgainEnd,
}

/// Why an engine's events cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("connect to {endpoint}: {source}")]
    Connect {
        endpoint: String,
        source: Box<zeromq::ZmqError>,
    },
    /// Batches may be missed from here on.
    #[error("the connection to {endpoint} is lost")]
    Lost { endpoint: String },
}

/// Hears one engine.
pub struct Source {
    endpoints: Endpoints,
    events: SubSocket,
    events_monitor: mpsc::Receiver<SocketEvent>,
    replay: Option<(DealerSocket, mpsc::Receiver<SocketEvent>)>,
}

impl Source {
    /// Connects to an engine that is there. Batches published before the subscription has arrived are not heard:
    /// ask for them.
    ///
    /// # Errors
    /// [`SourceError::Connect`].
    pub async fn connect(endpoints: &Endpoints) -> Result<Self, SourceError> {
        let mut events = SubSocket::with_options(options());
        let subscribed = events.subscribe(&endpoints.topic).await;
        subscribed.map_err(|error| failed(&endpoints.events, error))?;
        let events_monitor = connect(&mut events, &endpoints.events).await?;
        let replay = match &endpoints.replay {
            Some(endpoint) => {
                let mut dealer = DealerSocket::with_options(options());
                let monitor = connect(&mut dealer, endpoint).await?;
                Some((dealer, monitor))
            }
            None => None,
        };
        Ok(Self {
            endpoints: endpoints.clone(),
            events,
            events_monitor,
            replay,
        })
    }

    /// Says whether the engine tells again what was missed.
    pub fn repairs(&self) -> bool {
        self.replay.is_some()
    }

    /// Asks for the batches from a number on. Answers are [`Heard::Again`], at last [`Heard::AgainEnd`]; ask one
    /// question at a time. Without a replay socket nothing is answered.
    ///
    /// # Errors
    /// [`SourceError::Lost`].
    pub async fn ask(&mut self, from: u64) -> Result<(), SourceError> {
        let Some((dealer, _)) = &mut self.replay else {
            return Ok(());
        };
        let mut message = ZmqMessage::from(Bytes::new());
        message.push_back(Bytes::copy_from_slice(&from.to_be_bytes()));
        let sent = dealer.send(message).await;
        sent.map_err(|_| lost(&self.endpoints))
    }

    /// Waits for what comes next. Cancel safe.
    ///
    /// # Errors
    /// [`SourceError::Lost`].
    pub async fn hear(&mut self) -> Result<Heard, SourceError> {
        loop {
            let replay = async {
                match &mut self.replay {
                    Some((dealer, monitor)) => tokio::select! {
                        message = dealer.recv() => message.ok(),
                        () = gone(monitor) => None,
                    },
                    None => std::future::pending().await,
                }
            };
            let (live, message) = tokio::select! {
                message = self.events.recv() => (true, message.ok()),
                message = replay => (false, message),
                () = gone(&mut self.events_monitor) => (true, None),
            };
            let Some(message) = message else {
                return Err(lost(&self.endpoints));
            };
            if let Some(heard) = heard(live, message.into_vec()) {
                return Ok(heard);
            }
        }
    }
}

/// Reads frames: `[topic, number, batch]` live, `["", topic, number, batch]` again, and before 0.27 no topic there.
/// The number is the first eight bytes of its frame; releases to come have more in it.
fn heard(live: bool, mut frames: Vec<Bytes>) -> Option<Heard> {
    let payload = frames.pop()?;
    let seq = u64::from_be_bytes(frames.pop()?.get(..8)?.try_into().ok()?);
    Some(match (live, seq) {
        (true, _) => Heard::Live(Numbered { seq, payload }),
        (false, END) => Heard::AgainEnd,
        (false, _) => Heard::Again(Numbered { seq, payload }),
    })
}

fn lost(endpoints: &Endpoints) -> SourceError {
    SourceError::Lost {
        endpoint: endpoints.events.clone(),
    }
}

fn failed(endpoint: &str, source: zeromq::ZmqError) -> SourceError {
    SourceError::Connect {
        endpoint: endpoint.to_owned(),
        source: Box::new(source),
    }
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT);
    options
}

async fn connect(
    socket: &mut impl Socket,
    endpoint: &str,
) -> Result<mpsc::Receiver<SocketEvent>, SourceError> {
    let monitor = socket.monitor();
    let connected = socket.connect(endpoint).await;
    connected.map_err(|error| failed(endpoint, error))?;
    Ok(monitor)
}

async fn gone(monitor: &mut mpsc::Receiver<SocketEvent>) {
    loop {
        match monitor.next().await {
            Some(SocketEvent::Disconnected(_)) | None => return,
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(parts: &[&[u8]]) -> Vec<Bytes> {
        parts
            .iter()
            .map(|part| Bytes::copy_from_slice(part))
            .collect()
    }

    #[test]
    fn frames_of_all_releases_are_read() {
        let numbered = |seq| Numbered {
            seq,
            payload: Bytes::from_static(b"p"),
        };
        let seq = 7u64.to_be_bytes();
        let mut long = seq.to_vec();
        long.extend([9; 16]);
        for (live, parts) in [
            (true, frames(&[b"topic", &seq, b"p"])),
            (true, frames(&[b"", &long, b"p"])),
            (false, frames(&[b"", b"topic", &seq, b"p"])),
            (false, frames(&[b"", &seq, b"p"])),
        ] {
            let expected = match live {
                true => Heard::Live(numbered(7)),
                false => Heard::Again(numbered(7)),
            };
            assert_eq!(heard(live, parts), Some(expected));
        }
        let end = heard(false, frames(&[b"", b"", &END.to_be_bytes(), b""]));
        assert_eq!(end, Some(Heard::AgainEnd));
        let none: [&[&[u8]]; 3] = [&[], &[b"x"], &[b"short", b"p"]];
        for parts in none {
            assert_eq!(heard(true, frames(parts)), None);
        }
    }
}
