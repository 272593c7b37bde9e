//! The tcp plane's frames over NATS: byte pipes between processors and workers through a NATS server.
//!
//! What travels on a pipe is that of [`tcp`](super::tcp), so all that holds there holds here. `wire` is the messages,
//! `pipe` makes bytes in order of them, and this file makes pipes: a worker subscribes to its [`fn@subject`], and who dials
//! publishes an opening there with a fresh subject for the way back. A pipe ends with the connection to the server, and
//! is dialled again by who dialled it.

mod pipe;
mod wire;

use std::io;

use async_nats::{Message, StatusCode, Subject, Subscriber, message::OutboundMessage};
use async_trait::async_trait;
use futures::{SinkExt, StreamExt};
use tokio::{sync::Mutex, sync::mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use super::{
    Address,
    net::{Dial, Io, Listen},
};
use crate::{
    ids::WorkerId,
    nats::{Connection, Life, Nats, NatsError, subject},
};
use pipe::{Ends, WINDOW};
use wire::{Opening, VERSION};

/// Pipes that may wait to be accepted; as many as the backlog of the tcp plane's listener.
const BACKLOG: usize = 1024;

/// A window below this is a mistake.
const LEAST_WINDOW: u32 = 4 << 10;

/// Returns the subject that a worker takes pipes on.
///
/// - `namespace`: of its endpoint.
pub fn subject(namespace: &str, worker: &WorkerId) -> String {
    let (namespace, worker) = (subject::token(namespace), subject::token(&worker.0));
    format!("stator.plane.{namespace}.{worker}")
}

/// Why there is no pipe.
#[derive(Debug, thiserror::Error)]
enum PipeError {
    #[error(transparent)]
    Nats(#[from] NatsError),
    #[error("no worker listens there")]
    Nobody,
    #[error("the worker speaks version {theirs} of pipes over NATS, this processor {VERSION}")]
    Version { theirs: u8 },
    #[error("what answers is no worker")]
    Stranger,
    #[error("{0}")]
    Library(String),
}

impl From<PipeError> for io::Error {
    fn from(error: PipeError) -> Self {
        let kind = match error {
            PipeError::Nats(_) => io::ErrorKind::NotConnected,
            PipeError::Nobody => io::ErrorKind::ConnectionRefused,
            PipeError::Version { .. } | PipeError::Stranger => io::ErrorKind::InvalidData,
            PipeError::Library(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// One end that has subscribed and not yet been answered.
struct Half {
    connection: Connection,
    life: Life,
    from: Subject,
    messages: Subscriber,
}

impl Half {
    async fn new(connection: Connection) -> Result<Self, PipeError> {
        let life = connection.life()?;
        let from = Subject::from(subject::fresh("pipe"));
        let messages = connection.client().subscribe(from.clone()).await;
        Ok(Self {
            messages: messages.map_err(library)?,
            connection,
            life,
            from,
        })
    }

    /// Introduces this end.
    async fn introduce(&self, to: Subject, asks: bool) -> Result<(), PipeError> {
        let opening = Opening {
            asks,
            version: VERSION,
            window: WINDOW,
        };
        let message = OutboundMessage {
            subject: to,
            reply: Some(self.from.clone()),
            payload: opening.encode(),
            headers: None,
        };
        let sent = self.connection.client().clone().send(message).await;
        sent.map_err(library)
    }

    /// Makes a pipe with who was introduced.
    fn join(self, to: Subject, theirs: Opening) -> Io {
        let ends = Ends {
            messages: self.messages,
            from: self.from,
            to,
            window: theirs.window,
            life: self.life,
        };
        let (reader, writer) = pipe::pipe(&self.connection, ends);
        Io {
            reader: Box::pin(reader),
            writer: Box::pin(writer),
        }
    }
}

fn library(error: impl std::error::Error) -> PipeError {
    PipeError::Library(error.to_string())
}

/// Reads who is introduced, and where it listens.
fn introduction(message: Message) -> Result<(Opening, Subject), PipeError> {
    if message.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(PipeError::Nobody);
    }
    let opening = Opening::decode(&message.payload).ok_or(PipeError::Stranger)?;
    let to = message.reply.ok_or(PipeError::Stranger)?;
    if opening.version != VERSION {
        let theirs = opening.version;
        return Err(PipeError::Version { theirs });
    }
    if opening.window < LEAST_WINDOW {
        return Err(PipeError::Stranger);
    }
    Ok((opening, to))
}

/// Dials workers by their subjects.
#[async_trait]
impl Dial for Nats {
    async fn dial(&self, place: &str) -> io::Result<Io> {
        Ok(dial(self, place).await?)
    }
}

async fn dial(nats: &Nats, place: &str) -> Result<Io, PipeError> {
    let mut half = Half::new(nats.connection().await?).await?;
    half.introduce(place.into(), true).await?;
    let life = half.life.clone();
    let answer = tokio::select! {
        answer = half.messages.next() => answer,
        () = life.cancelled() => None,
    };
    let lost = || half.connection.lost();
    let (theirs, to) = introduction(answer.ok_or_else(lost)?)?;
    if theirs.asks {
        return Err(PipeError::Stranger);
    }
    Ok(half.join(to, theirs))
}

/// Takes pipes on a worker's subject.
pub struct Listener {
    subject: String,
    pipes: Mutex<mpsc::Receiver<(Io, String)>>,
    _stop: DropGuard,
}

impl Listener {
    /// Subscribes. Pipes that are dialled from now on wait to be accepted.
    ///
    /// - `subject`: see [`fn@subject`].
    ///
    /// # Errors
    /// [`NatsError`].
    pub async fn bind(nats: &Nats, subject: String) -> io::Result<Self> {
        let connection = nats.connection().await.map_err(PipeError::from)?;
        let openings = connection.client().subscribe(subject.clone()).await;
        let openings = openings.map_err(library)?;
        // Who dials from now on finds it.
        connection.settle().await.map_err(PipeError::from)?;
        let (accepted, pipes) = mpsc::channel(BACKLOG);
        let stop = CancellationToken::new();
        let answered = answer(connection, openings, accepted);
        tokio::spawn(stop.clone().run_until_cancelled_owned(answered));
        Ok(Self {
            subject,
            pipes: Mutex::new(pipes),
            _stop: stop.drop_guard(),
        })
    }
}

/// Answers openings. Only the library ends it, which it does with the process.
async fn answer(
    connection: Connection,
    mut openings: Subscriber,
    accepted: mpsc::Sender<(Io, String)>,
) {
    while let Some(message) = openings.next().await {
        // Who dialled finds nobody there, or nothing, and tries again.
        let Ok(room) = accepted.try_reserve() else {
            warn!("more pipes are dialled than accepted: one is not answered");
            continue;
        };
        match accept(&connection, message).await {
            Ok(pipe) => room.send(pipe),
            Err(error) => debug!(%error, "no pipe"),
        }
    }
}

async fn accept(connection: &Connection, message: Message) -> Result<(Io, String), PipeError> {
    let (theirs, to) = match introduction(message.clone()) {
        // So that who dialled can say which version it meets.
        Err(PipeError::Version { theirs }) => {
            if let Some(to) = message.reply {
                Half::new(connection.clone())
                    .await?
                    .introduce(to, false)
                    .await?;
            }
            return Err(PipeError::Version { theirs });
        }
        introduced => introduced?,
    };
    if !theirs.asks {
        return Err(PipeError::Stranger);
    }
    let half = Half::new(connection.clone()).await?;
    half.introduce(to.clone(), false).await?;
    let peer = format!("nats://{to}");
    Ok((half.join(to, theirs), peer))
}

#[async_trait]
impl Listen for Listener {
    async fn accept(&self) -> io::Result<(Io, String)> {
        let pipe = self.pipes.lock().await.recv().await;
        pipe.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn address(&self) -> io::Result<Address> {
        Ok(Address::Nats(self.subject.clone()))
    }
}
