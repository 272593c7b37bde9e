//! The talk about a line: a processor's desk, and the worker at it.

use std::time::Duration;

use async_nats::{Client, RequestErrorKind, Subject, Subscriber};
use futures::StreamExt;
use tokio::time::timeout;

use super::{Answer, Invitation, LineError, Offer, Said, Ticket, decode, encode, is_desk, library};
use crate::{
    ids::WorkerId,
    nats::{INBOX, Nats, subject},
    plane::is_subject,
};

/// How often workers are invited. Those that hear nothing for several times as long take no more.
pub const INVITE_EVERY: Duration = Duration::from_secs(1);

/// How long a worker waits for an answer: a processor answers at once, if it does anything.
const PATIENCE: Duration = Duration::from_millis(500);

/// Returns the subject on which a worker is invited.
///
/// - `place`: of its address on the request plane.
fn invitations(place: &str) -> String {
    format!("{place}.line")
}

/// Says whether a text from elsewhere is a subject on which one of us waits for an answer.
fn is_inbox(text: &str) -> bool {
    let after = text.strip_prefix(INBOX);
    after.is_some_and(|after| after.starts_with('.')) && is_subject(text)
}

/// Where a processor is asked by workers.
pub struct Desk {
    client: Client,
    subject: String,
    said: Subscriber,
}

/// What a worker said at a desk.
pub enum Heard {
    /// It takes from the line.
    Pulls(WorkerId),
    /// It has room, and waits for the answer.
    Offers(Offer, Reply),
}

/// Whom an offer is answered to.
pub struct Reply(Subject);

impl Desk {
    /// Opens a desk.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn open(nats: &Nats) -> Result<Self, LineError> {
        let client = nats.connection().await?.client().clone();
        let subject = subject::fresh("desk");
        let said = client.subscribe(subject.clone()).await.map_err(library)?;
        Ok(Self {
            client,
            subject,
            said,
        })
    }

    /// Returns a ticket of a number.
    pub fn ticket(&self, number: u64) -> Ticket {
        Ticket {
            desk: self.subject.clone(),
            number,
        }
    }

    /// Invites a worker.
    ///
    /// - `place`: of its address on the request plane.
    ///
    /// # Errors
    /// The connection is over for good.
    pub async fn invite(&self, place: &str, invitation: &Invitation) -> Result<(), LineError> {
        let (to, from) = (invitations(place), self.subject.clone());
        let sent = self.client.publish_with_reply(to, from, encode(invitation));
        sent.await.map_err(library)
    }

    /// Answers an offer. An answer that is lost counts as none: the worker gives the ticket back.
    pub async fn answer(&self, Reply(to): Reply, answer: &Answer) {
        if let Err(error) = self.client.publish(to, encode(answer)).await {
            tracing::debug!(%error, "an offer is not answered");
        }
    }

    /// Waits for what workers say. Absent: the connection is over for good. Cancel safe.
    pub async fn next(&mut self) -> Option<Heard> {
        loop {
            let message = self.said.next().await?;
            let reply = message.reply.filter(|to| is_inbox(to));
            match (decode(&message.payload), reply) {
                (Some(Said::Pulls(worker)), _) => return Some(Heard::Pulls(worker)),
                (Some(Said::Offers(offer)), Some(to)) => {
                    return Some(Heard::Offers(offer, Reply(to)));
                }
                // Not ours, or that a worker is not there that was invited.
                (Some(Said::Offers(_)) | None, _) => {}
            }
        }
    }
}

/// A worker, as processors talk to it.
pub struct Guest {
    client: Client,
    invitations: Subscriber,
    worker: WorkerId,
}

/// Why an offer was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    #[error("the processor is gone")]
    Gone,
    #[error("the processor does not answer")]
    Silent,
}

impl Guest {
    /// Listens for invitations.
    ///
    /// - `place`: of the worker's address on the request plane.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn listen(nats: &Nats, place: &str, worker: WorkerId) -> Result<Self, LineError> {
        let client = nats.connection().await?.client().clone();
        let invitations = client.subscribe(invitations(place)).await;
        Ok(Self {
            invitations: invitations.map_err(library)?,
            client,
            worker,
        })
    }

    /// Waits for the next invitation, and says from which desk it is; to which line is the caller's to judge. Cancel
    /// safe.
    pub async fn invited(&mut self) -> (Invitation, String) {
        while let Some(message) = self.invitations.next().await {
            let desk = message.reply.filter(|desk| is_desk(desk));
            if let (Some(invitation), Some(desk)) = (decode(&message.payload), desk) {
                return (invitation, desk.to_string());
            }
        }
        // Only with the process.
        std::future::pending().await
    }

    /// Tells a desk that this worker takes from the line.
    pub async fn accept(&self, desk: String) {
        let said = encode(&Said::Pulls(self.worker.clone()));
        if let Err(error) = self.client.publish(desk, said).await {
            tracing::debug!(%error, "an invitation is not answered");
        }
    }

    /// Offers to take the prompt of a ticket.
    ///
    /// - `ranks`: those that have room.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn offer(&self, ticket: &Ticket, ranks: Vec<u32>) -> Result<Answer, Unanswered> {
        let said = encode(&Said::Offers(Offer {
            number: ticket.number,
            worker: self.worker.clone(),
            ranks,
        }));
        let asked = self.client.request(ticket.desk.clone(), said);
        match timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => decode(&answer.payload).ok_or(Unanswered::Silent),
            Ok(Err(error)) if error.kind() == RequestErrorKind::NoResponders => {
                Err(Unanswered::Gone)
            }
            Ok(Err(_)) | Err(_) => Err(Unanswered::Silent),
        }
    }
}
