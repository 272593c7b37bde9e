//! What carries news: one side publishes and answers questions, the other hears and asks.

use async_trait::async_trait;
use bytes::Bytes;

use super::{nats, zmq};
use crate::{
    card::Relay,
    nats::{Nats, NatsError},
};

/// Why news does not travel.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    #[error("'{0}' names no event plane: expected tcp://host:port or nats://subject")]
    Address(String),
    #[error("listen on {endpoint}: {source}")]
    Listen {
        endpoint: String,
        source: Box<::zeromq::ZmqError>,
    },
    #[error("connect to {endpoint}: {reason}")]
    Connect { endpoint: String, reason: String },
    #[error("the connection to {endpoint} is lost")]
    Lost { endpoint: String },
    #[error(transparent)]
    Nats(#[from] NatsError),
}

/// What a subscriber hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// What was published under a topic that it subscribed to.
    News(Bytes),
    /// A piece of the answer to a question of its own.
    Answer(Bytes),
}

/// A subscriber's connection to one publisher.
#[async_trait]
pub trait Feed: Send {
    /// Waits for what comes next. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::Lost`]: from here on news is missed; connect again.
    async fn hear(&mut self) -> Result<Heard, PlaneError>;

    /// Asks a question, which is answered by any number of pieces, or not at all.
    ///
    /// # Errors
    /// [`PlaneError::Lost`].
    async fn ask(&mut self, question: Bytes) -> Result<(), PlaneError>;
}

/// Somebody's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// To whom the answer goes.
    pub asker: Asker,
    pub question: Bytes,
}

/// Somebody who asked; opaque, of the plane that it came by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Asker(pub(super) Bytes);

/// A publisher.
#[async_trait]
pub trait Outlet: Send {
    /// Publishes to whoever listens now. Never waits for them: who lags loses.
    async fn publish(&mut self, topic: &str, news: Bytes);

    /// Waits for a question. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::Lost`]: nobody can ask any more.
    async fn asked(&mut self) -> Result<Question, PlaneError>;

    /// Sends a piece of an answer. Whether it arrives is not known.
    async fn answer(&mut self, asker: &Asker, answer: Bytes);
}

/// Connects to a relay's publisher, and subscribes.
///
/// - `nats`: the link for a relay that is reached by it.
/// - `topics`: what the topics begin with that are subscribed to; ends in `/`.
///
/// # Errors
/// [`PlaneError::Address`], [`PlaneError::Connect`] and [`PlaneError::Nats`].
pub async fn connect(
    nats: &Nats,
    relay: &Relay,
    topics: &str,
) -> Result<Box<dyn Feed>, PlaneError> {
    Ok(match nats::place(&relay.endpoint) {
        Some(_) => Box::new(nats::Feed::connect(nats, relay, topics).await?),
        None => Box::new(zmq::Feed::connect(relay, topics).await?),
    })
}
