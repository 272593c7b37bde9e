//! News by NATS: topics and questions are subjects, and answers come to a subject of who asked.
//!
//! The server forwards news to whoever listens and keeps none. Who does not take what comes loses some (65,536 messages
//! wait in the library), as everybody does while the server is gone; both are noticed by the numbers in the messages. An
//! answer may be larger than a message: it is cut, and put together again by who asked.

use async_nats::{Client, StatusCode, Subject, Subscriber, message::OutboundMessage};
use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use tracing::warn;

use super::plane::{self, Asker, Heard, PlaneError, Question};
use crate::{
    card::Relay,
    nats::{Connection, Life, Nats, subject},
    plane::is_subject,
};

/// What subjects look like on a card.
const SCHEME: &str = "nats://";

/// Bytes of a piece of an answer before its content: whether it is the last one, and its number.
const HEADER: usize = 5;

/// Returns where followers find a publisher of this name.
pub fn advertised(name: &str) -> Relay {
    let name = subject::token(name);
    Relay {
        endpoint: format!("{SCHEME}stator.kv.{name}.news"),
        snapshot_endpoint: format!("{SCHEME}stator.kv.{name}.ask"),
    }
}

/// Returns the subject of an address on a card; `None` if it is of another plane.
pub(super) fn place(endpoint: &str) -> Option<&str> {
    endpoint.strip_prefix(SCHEME)
}

/// A publisher.
pub struct Outlet {
    connection: Connection,
    /// What its news begins with.
    news: String,
    questions: Subscriber,
    /// A message was too large, which was said.
    complained: bool,
}

impl Outlet {
    /// Publishes from here on under a name.
    ///
    /// # Errors
    /// [`PlaneError::Nats`].
    pub async fn bind(nats: &Nats, name: &str) -> Result<Self, PlaneError> {
        let relay = advertised(name);
        let connection = nats.connection().await?;
        let questions = subscribe(&connection, subject_of(&relay.snapshot_endpoint)?).await?;
        // Who asks from now on finds it.
        connection.settle().await?;
        Ok(Self {
            connection,
            news: subject_of(&relay.endpoint)?.to_owned(),
            questions,
            complained: false,
        })
    }

    /// Sends, if there is a server now. Waits for nobody but it.
    async fn send(&mut self, subject: Subject, payload: Bytes) {
        let Ok(life) = self.connection.life() else {
            return;
        };
        let message = message(subject, None, payload);
        // Each call's own: one that is given up leaves nothing half sent.
        let mut client = self.connection.client().clone();
        tokio::select! {
            sent = client.send(message) => if let Err(error) = sent
                && !std::mem::replace(&mut self.complained, true)
            {
                warn!(%error, "news cannot be sent by NATS");
            },
            () = life.cancelled() => {}
        }
    }
}

fn message(subject: Subject, reply: Option<Subject>, payload: Bytes) -> OutboundMessage {
    OutboundMessage {
        subject,
        reply,
        payload,
        headers: None,
    }
}

fn subject_of(endpoint: &str) -> Result<&str, PlaneError> {
    // From a card: what is no subject could end up as something else on the wire.
    let subject = place(endpoint).filter(|subject| is_subject(subject));
    subject.ok_or_else(|| PlaneError::Address(endpoint.to_owned()))
}

/// Returns the subject of a topic, or of all topics that begin with one that ends in `/`.
fn subject_of_topic(news: &str, topic: &str) -> String {
    let parts = topic.split('/').map(|part| match part {
        "" => ">".to_owned(),
        part => subject::token(part),
    });
    let parts: Vec<String> = parts.collect();
    format!("{news}.{}", parts.join("."))
}

async fn subscribe(connection: &Connection, subject: &str) -> Result<Subscriber, PlaneError> {
    let subscribed = connection.client().subscribe(subject.to_owned()).await;
    subscribed.map_err(|error| PlaneError::Connect {
        endpoint: format!("{SCHEME}{subject}"),
        reason: error.to_string(),
    })
}

#[async_trait]
impl plane::Outlet for Outlet {
    async fn publish(&mut self, topic: &str, news: Bytes) {
        let subject = subject_of_topic(&self.news, topic);
        self.send(subject.into(), news).await;
    }

    async fn asked(&mut self) -> Result<Question, PlaneError> {
        loop {
            let Some(message) = self.questions.next().await else {
                return Err(self.connection.lost().into());
            };
            // Anything else is not from one of us.
            if let Some(reply) = message.reply {
                return Ok(Question {
                    asker: Asker(Bytes::copy_from_slice(reply.as_bytes())),
                    question: message.payload,
                });
            }
        }
    }

    async fn answer(&mut self, asker: &Asker, answer: Bytes) {
        let Ok(to) = std::str::from_utf8(&asker.0) else {
            return;
        };
        let to = Subject::from(to);
        let largest = self.connection.client().max_payload();
        for piece in pieces(&answer, largest) {
            self.send(to.clone(), piece).await;
        }
    }
}

/// Cuts an answer into messages.
///
/// - `largest`: what the server takes.
fn pieces(answer: &[u8], largest: usize) -> impl Iterator<Item = Bytes> {
    let most = largest.saturating_sub(HEADER).max(1);
    let count = answer.len().div_ceil(most).max(1);
    (0_u32..).take(count).scan(answer, move |rest, number| {
        let (piece, after) = rest.split_at(rest.len().min(most));
        *rest = after;
        let mut bytes = BytesMut::with_capacity(HEADER + piece.len());
        bytes.put_u8(u8::from(after.is_empty()));
        bytes.put_u32_le(number);
        bytes.put_slice(piece);
        Some(bytes.freeze())
    })
}

/// An answer on its way.
#[derive(Default)]
struct Pieces {
    bytes: BytesMut,
    due: u32,
}

impl Pieces {
    /// Takes a piece. Returns the answer once it is whole. One of which a piece is missing is dropped; its question is
    /// asked again.
    fn take(&mut self, mut piece: Bytes) -> Option<Bytes> {
        if piece.len() < HEADER {
            return None;
        }
        let header = piece.split_to(HEADER);
        let (&last, number) = header.split_first()?;
        let number = u32::from_le_bytes(number.try_into().ok()?);
        if number == 0 {
            *self = Self::default();
        } else if number != self.due {
            // Nothing fits any more until another answer begins.
            self.due = 0;
            return None;
        }
        self.due = number + 1;
        if last == 0 {
            self.bytes.extend_from_slice(&piece);
            return None;
        }
        if number == 0 {
            return Some(piece);
        }
        self.bytes.extend_from_slice(&piece);
        Some(std::mem::take(self).bytes.freeze())
    }
}

/// A subscriber.
pub struct Feed {
    connection: Connection,
    client: Client,
    life: Life,
    ask: Subject,
    news: Subscriber,
    answers: Subscriber,
    /// Where answers come.
    here: Subject,
    answer: Pieces,
}

impl Feed {
    /// Connects, and subscribes to the topics that begin with `topics`, which ends in `/`.
    ///
    /// # Errors
    /// [`PlaneError::Address`], [`PlaneError::Nats`] and [`PlaneError::Connect`].
    pub async fn connect(nats: &Nats, relay: &Relay, topics: &str) -> Result<Self, PlaneError> {
        let news = subject_of_topic(subject_of(&relay.endpoint)?, topics);
        let ask = Subject::from(subject_of(&relay.snapshot_endpoint)?);
        let connection = nats.connection().await?;
        let life = connection.life()?;
        let here = subject::fresh("answer");
        Ok(Self {
            news: subscribe(&connection, &news).await?,
            answers: subscribe(&connection, &here).await?,
            client: connection.client().clone(),
            connection,
            life,
            ask,
            here: here.into(),
            answer: Pieces::default(),
        })
    }

    fn lost(&self) -> PlaneError {
        self.connection.lost().into()
    }
}

#[async_trait]
impl plane::Feed for Feed {
    async fn hear(&mut self) -> Result<Heard, PlaneError> {
        loop {
            let (is_news, message) = tokio::select! {
                message = self.news.next() => (true, message),
                message = self.answers.next() => (false, message),
                () = self.life.cancelled() => return Err(self.lost()),
            };
            let message = message.ok_or_else(|| self.lost())?;
            if message.status == Some(StatusCode::NO_RESPONDERS) {
                let endpoint = format!("{SCHEME}{}", self.ask);
                return Err(PlaneError::Lost { endpoint });
            }
            if is_news {
                return Ok(Heard::News(message.payload));
            }
            if let Some(answer) = self.answer.take(message.payload) {
                return Ok(Heard::Answer(answer));
            }
        }
    }

    async fn ask(&mut self, question: Bytes) -> Result<(), PlaneError> {
        let message = message(self.ask.clone(), Some(self.here.clone()), question);
        let sent = tokio::select! {
            sent = self.client.send(message) => sent.is_ok(),
            () = self.life.cancelled() => false,
        };
        sent.then_some(()).ok_or_else(|| self.lost())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_subjects_and_a_prefix_takes_all_below_it() {
        assert_eq!(subject_of_topic("n", "kv/agg-1/0"), "n.kv.agg-1.0");
        assert_eq!(subject_of_topic("n", "kv/a.b/"), "n.kv.a=2eb.>");
    }

    #[test]
    fn an_answer_is_cut_and_whole_again_or_not_at_all() {
        let answer: Vec<u8> = (0..=255).collect();
        let mut taken = Pieces::default();
        for largest in [6, 8, 100, 1000] {
            let whole = pieces(&answer, largest).filter_map(|piece| taken.take(piece));
            assert_eq!(whole.collect::<Vec<_>>(), [Bytes::from(answer.clone())]);
        }
        let lossy = pieces(&answer, 100).enumerate().filter(|(n, _)| *n != 1);
        assert_eq!(lossy.filter_map(|(_, piece)| taken.take(piece)).count(), 0);
        let empty = pieces(b"", 100).filter_map(|piece| taken.take(piece));
        assert_eq!(empty.collect::<Vec<_>>(), [Bytes::new()]);
    }
}
