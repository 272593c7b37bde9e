//! The line in which prompts of a model wait for prefill workers, where NATS holds it.
//!
//! Processors share it, and prefill workers that have room take from it. What stands in line is no prompt but a
//! [`Ticket`]: it names the processor that has one. A prompt may be long, whoever sent it may leave, and what a worker's
//! cache has of it only a processor knows; so all that stays there, and the line says only whose turn it is:
//!
//! ```text
//! processor ── Invitation ───▶ worker     every second, to each prefill worker: that is how a worker knows of a line
//! worker    ── Pulls ────────▶ processor  once it takes from that line: that is how a processor knows of a worker
//! processor ── Ticket ──▶ NATS ──▶ worker with room
//! worker    ── Offer ────────▶ processor  "I have room, and your ticket"
//! processor ── Answer ───────▶ worker     sent: a prompt comes by the request plane; over: nobody waits by this ticket;
//!                                         later: whoever waits is better off elsewhere, for so long
//! ```
//!
//! Nobody waits for somebody who is gone: a ticket whose processor is gone costs a worker one question, which the server
//! answers; one that a worker took and did not answer for goes to another. The line is in the server's memory and
//! nothing depends on its being kept: processors know who waits, and see to it when the line is lost.
//!
//! [`line`] is the line, [`desk`] the talk about it. Which prompt a worker gets is not decided here.

pub mod desk;
pub mod line;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    ids::WorkerId,
    nats::{NatsError, subject},
    plane::is_subject,
};

/// The longest name of a stream or of a consumer: a NATS server takes 255 bytes.
const LONGEST_NAME: usize = 200;

/// What the subjects of desks begin with.
const DESKS: &str = "stator.desk.";

/// What a line is called at a NATS server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LineName {
    /// Of its stream.
    pub stream: String,
    /// What its subjects begin with.
    pub subject: String,
}

impl LineName {
    /// Names the line of a model. Different lines have different names, whatever characters are in their parts.
    ///
    /// - `namespace`: of the workers' endpoint.
    pub fn new(namespace: &str, model: &str) -> Self {
        let (namespace, model) = (subject::token(namespace), subject::token(model));
        // No part has a '+'.
        let mut name = format!("{namespace}+{model}");
        let mut parts = format!("{namespace}.{model}");
        if name.len() > LONGEST_NAME {
            let hash = blake3::hash(name.as_bytes()).to_hex().to_string();
            parts = format!("+.{hash}");
            name = format!("+{hash}");
        }
        Self {
            stream: format!("stator-line-{name}"),
            subject: format!("stator.line.{parts}"),
        }
    }

    /// Returns the subject of tickets for anybody.
    fn anybody(&self) -> String {
        format!("{}.any", self.subject)
    }

    /// Returns the subject of tickets that a worker is to have before others.
    fn only(&self, worker: &WorkerId) -> String {
        format!("{}.for.{}", self.subject, part(worker))
    }
}

/// Returns a worker's part of the names that are its own. Different workers have different parts.
fn part(worker: &WorkerId) -> String {
    let part = subject::token(&worker.0);
    if part.len() > LONGEST_NAME {
        // No other part has a '+'.
        format!("+{}", blake3::hash(part.as_bytes()).to_hex())
    } else {
        part
    }
}

/// Says whether a text from elsewhere is the subject of a desk. What is no subject could end up as something else on the
/// wire.
fn is_desk(text: &str) -> bool {
    text.starts_with(DESKS) && is_subject(text)
}

/// What stands in line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Where the processor answers offers.
    pub desk: String,
    /// Of the ticket, at that desk.
    pub number: u64,
}

impl Ticket {
    /// Reads a ticket; absent: it is not one of ours, or nobody may be asked about it.
    fn read(bytes: &[u8]) -> Option<Self> {
        decode(bytes).filter(|ticket: &Self| is_desk(&ticket.desk))
    }
}

/// Asks a worker to take from a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    pub line: LineName,
}

/// A worker with room that has a ticket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub number: u64,
    pub worker: WorkerId,
    /// Those of its ranks that have room; at least one.
    pub ranks: Vec<u32>,
}

/// What a worker says to a desk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Pulls(WorkerId),
    Offers(Offer),
}

/// What becomes of an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A prompt comes by the request plane.
    Sent {
        /// The id of the request.
        request: String,
        rank: u32,
        /// Its tokens that the worker does not have cached, as far as is known.
        tokens: u64,
    },
    /// Nobody waits by this ticket.
    Over,
    /// Who waits by it is not for this worker, for so long.
    Later { ms: u64 },
}

/// Why a line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error(transparent)]
    Nats(#[from] NatsError),
    #[error(
        "the NATS server at {servers} has no JetStream, which holds the line of prompts: start it with 'nats-server -js', \
         or set 'jetstream {{}}' in its configuration"
    )]
    NoJetStream { servers: String },
    #[error(
        "JetStream at {servers} does not answer: a login must be allowed to publish to '$JS.API.>' and '$JS.ACK.>'"
    )]
    Silent { servers: String },
    #[error("JetStream: {0}")]
    Library(String),
    #[error("the line {0} was lost or emptied")]
    Lost(String),
}

fn library(error: impl std::fmt::Display) -> LineError {
    LineError::Library(error.to_string())
}

fn encode(message: &impl Serialize) -> bytes::Bytes {
    // Of names and numbers: nothing in it can fail.
    serde_json::to_vec(message).unwrap_or_default().into()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    serde_json::from_slice(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_lines_have_different_names_that_a_server_takes() {
        let long = "m".repeat(300);
        let parts = [
            ("a", "b-c"),
            ("a-b", "c"),
            ("a.b", "c"),
            ("a", "org/model.v1 *>"),
            ("", ""),
            ("a", &long),
            ("b", &long),
        ];
        let names = parts.map(|(namespace, model)| LineName::new(namespace, model));
        for (nth, name) in names.iter().enumerate() {
            assert!(name.stream.len() < 256 && name.subject.len() < 256);
            assert!(
                !name.stream.contains(['.', '*', '>', ' ', '/', '\\']),
                "{name:?}"
            );
            assert!(!name.subject.contains(['*', '>', ' ']), "{name:?}");
            assert_eq!(name.subject.split('.').count(), 4, "{name:?}");
            let later = &names[nth + 1..];
            assert!(later.iter().all(|other| other.stream != name.stream));
            assert!(later.iter().all(|other| other.subject != name.subject));
        }
    }

    #[test]
    fn a_worker_has_a_part_of_its_own_that_a_server_takes() {
        let long = |end: &str| WorkerId(format!("{}{end}", "w.".repeat(200)));
        let (one, other) = (part(&long("1")), part(&long("2")));
        assert_ne!(one, other);
        assert!(one.len() <= LONGEST_NAME && is_subject(&one), "{one}");
        assert_eq!(part(&WorkerId("w.1".to_owned())), "w=2e1");
    }

    #[test]
    fn a_ticket_is_ours_only_if_it_names_a_desk() {
        let read = |desk: &str| {
            let desk = desk.to_owned();
            Ticket::read(&encode(&Ticket { desk, number: 1 }))
        };
        assert!(read(&subject::fresh("desk")).is_some());
        for desk in [
            "stator.desk.a 5\r\nPUB stator.other 0\r\n",
            "stator.desk.a\r\nPING",
            "stator.desk.a b",
            "stator.desk.*",
            "stator.desk.>",
            "stator.desk.",
            "stator.desk..a",
            "stator.line.a",
            "$JS.API.STREAM.DELETE.s",
            "",
        ] {
            assert_eq!(read(desk), None, "{desk:?}");
        }
    }

    #[test]
    fn what_is_said_is_read_and_anything_else_is_not() {
        let answer = Answer::Sent {
            request: "r".to_owned(),
            rank: 1,
            tokens: 7,
        };
        assert_eq!(decode(&encode(&answer)), Some(answer));
        assert_eq!(decode::<Ticket>(b"{\"desk\":3}"), None);
        assert_eq!(decode::<Said>(b"\xff"), None);
    }
}
