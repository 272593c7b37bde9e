//! The line at the NATS server: a work queue of JetStream, kept in memory.
//!
//! There are subjects for tickets that anybody may have, and one per worker for those that it is to have first. Each ticket
//! goes to one who asked for one; what is neither answered for nor given back within [`ACK_WAIT`] goes to another.

use std::time::Duration;

use async_nats::jetstream::{
    self, AckKind, Context,
    consumer::{AckPolicy, PullConsumer, pull},
    context::{CreateStreamError, CreateStreamErrorKind},
    stream::{self, DiscardPolicy, RetentionPolicy, StorageType, Stream},
};
use futures::{FutureExt, StreamExt};

use super::{LineError, LineName, Ticket, encode, library, part};
use crate::{
    ids::WorkerId,
    nats::{Life, Nats},
};

/// How long a ticket stays, at most: for what a processor leaves behind that ends while no worker takes.
pub const MAX_AGE: Duration = Duration::from_secs(600);

/// Tickets in a line, at most. A server holds some 200 bytes for each.
const MOST_TICKETS: i64 = 1 << 18;

/// How long a worker may keep a ticket without a word: longer than it asks a processor about it.
const ACK_WAIT: Duration = Duration::from_secs(2);

/// Tickets that workers have and did not answer for, at most; those that are given back for a while count too.
const MOST_PENDING: i64 = 1 << 17;

/// Workers that may ask at a time; the server's own limit is 512.
const MOST_ASKING: i64 = 1 << 14;

/// How long what is a worker's own is kept at the server after the worker is gone.
const INACTIVE: Duration = Duration::from_secs(60);

/// How long a worker asks before it asks anew, so that a server that forgot it hears of it again.
const ASK: Duration = Duration::from_secs(5);

/// How long an answer of JetStream is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// JetStream's way to say that it is not there ("Service Unavailable").
const UNAVAILABLE: usize = 503;

/// A line that is there. It ends with the connection's life.
pub struct Line {
    context: Context,
    name: LineName,
    stream: Stream,
    life: Life,
}

impl Line {
    /// Opens a line, and makes it if it is not there.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn open(nats: &Nats, name: &LineName) -> Result<Self, LineError> {
        let connection = nats.connection().await?;
        let life = connection.life()?;
        let mut context = jetstream::new(connection.client().clone());
        context.set_timeout(PATIENCE);
        let config = stream::Config {
            name: name.stream.clone(),
            description: Some("prompts that wait for prefill workers".to_owned()),
            subjects: vec![format!("{}.>", name.subject)],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::Memory,
            discard: DiscardPolicy::New,
            max_age: MAX_AGE,
            max_messages: MOST_TICKETS,
            ..stream::Config::default()
        };
        let opened = context.get_or_create_stream(config).await;
        let stream = opened.map_err(|error| cause(&error, connection.servers()))?;
        Ok(Self {
            context,
            name: name.clone(),
            stream,
            life,
        })
    }

    /// Returns the life with which the line ends.
    pub fn life(&self) -> &Life {
        &self.life
    }

    /// Puts a ticket at the end. When this returns, it is on its way; the future that it returns says that it is there.
    ///
    /// - `only`: who is to have it; absent: anybody.
    ///
    /// # Errors
    /// [`LineError`], of either.
    pub async fn put(
        &self,
        only: Option<&WorkerId>,
        ticket: &Ticket,
    ) -> Result<impl Future<Output = Result<(), LineError>> + Send + 'static, LineError> {
        let subject = only.map_or_else(|| self.name.anybody(), |worker| self.name.only(worker));
        let sent = self.context.publish(subject, encode(ticket)).await;
        let taken = sent.map_err(library)?.into_future();
        Ok(taken.map(|taken| taken.map(drop).map_err(library)))
    }

    /// Looks whether it is still the line that was opened, and returns how many tickets are in it.
    ///
    /// # Errors
    /// It is another one or none; the server does not say.
    pub async fn tickets(&self) -> Result<u64, LineError> {
        let info = self.stream.get_info().await.map_err(library)?;
        if info.created == self.stream.cached_info().created {
            Ok(info.state.messages)
        } else {
            Err(LineError::Lost(self.name.stream.clone()))
        }
    }

    /// Prepares to take tickets, as a worker.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn pulls(&self, worker: &WorkerId) -> Result<Pulls, LineError> {
        let anybody = self.consumer("any", self.name.anybody(), Duration::ZERO);
        let own = format!("for-{}", part(worker));
        let own = self.consumer(&own, self.name.only(worker), INACTIVE);
        let (own, anybody) = (own.await?, anybody.await?);
        Ok(Pulls {
            own: Pull::new(own),
            anybody: Pull::new(anybody),
            life: self.life.clone(),
        })
    }

    async fn consumer(
        &self,
        name: &str,
        filter: String,
        inactive: Duration,
    ) -> Result<PullConsumer, LineError> {
        let config = pull::Config {
            durable_name: Some(name.to_owned()),
            filter_subject: filter,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: MOST_PENDING,
            max_waiting: MOST_ASKING,
            inactive_threshold: inactive,
            ..pull::Config::default()
        };
        self.stream.create_consumer(config).await.map_err(library)
    }
}

fn cause(error: &CreateStreamError, servers: &str) -> LineError {
    let servers = servers.to_owned();
    match error.kind() {
        CreateStreamErrorKind::JetStreamUnavailable => LineError::NoJetStream { servers },
        CreateStreamErrorKind::JetStream(told) if told.code() == UNAVAILABLE => {
            LineError::NoJetStream { servers }
        }
        CreateStreamErrorKind::TimedOut => LineError::Silent { servers },
        _ => library(error),
    }
}

/// A worker's hands: it asks for its own tickets and for anybody's, one of each at a time.
pub struct Pulls {
    own: Pull,
    anybody: Pull,
    life: Life,
}

struct Pull {
    consumer: PullConsumer,
    asked: Option<pull::Batch>,
}

impl Pulls {
    /// Says whether nothing comes any more.
    pub fn is_over(&self) -> bool {
        self.life.is_cancelled()
    }

    /// Asks for tickets, where none is asked for.
    ///
    /// # Errors
    /// [`LineError::Library`].
    pub async fn ask(&mut self) -> Result<(), LineError> {
        self.own.ask().await?;
        self.anybody.ask().await
    }

    /// Waits until a ticket comes that was asked for, the worker's own first; also one that was asked for earlier.
    /// Absent: one must ask again. Cancel safe.
    ///
    /// # Errors
    /// The server does not know who asks any more: the line must be opened again.
    pub async fn next(&mut self) -> Result<Option<Taken>, LineError> {
        tokio::select! {
            biased;
            taken = self.own.next() => taken,
            taken = self.anybody.next() => taken,
            () = self.life.cancelled() => Ok(None),
        }
    }
}

impl Pull {
    fn new(consumer: PullConsumer) -> Self {
        Self {
            consumer,
            asked: None,
        }
    }

    async fn ask(&mut self) -> Result<(), LineError> {
        if self.asked.is_none() {
            // Unlike a batch, this waits for what comes.
            let asked = self.consumer.batch().max_messages(1).expires(ASK);
            self.asked = Some(asked.messages().await.map_err(library)?);
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Taken>, LineError> {
        let Some(asked) = &mut self.asked else {
            return std::future::pending().await;
        };
        let message = asked.next().await;
        self.asked = None;
        let message = message.transpose().map_err(library)?;
        Ok(message.map(|message| Taken {
            ticket: Ticket::read(&message.payload),
            message,
        }))
    }
}

/// A ticket that a worker has until it says what becomes of it.
pub struct Taken {
    message: jetstream::Message,
    ticket: Option<Ticket>,
}

impl Taken {
    /// Returns the ticket; absent: it is not one of ours.
    pub fn ticket(&self) -> Option<&Ticket> {
        self.ticket.as_ref()
    }

    /// Takes it out of the line.
    pub async fn done(self) {
        self.say(AckKind::Ack).await;
    }

    /// Gives it back, for others; for so long nobody gets it.
    pub async fn back(self, pause: Option<Duration>) {
        self.say(AckKind::Nak(pause)).await;
    }

    async fn say(self, kind: AckKind) {
        // What is not said counts as given back, a little later.
        if let Err(error) = self.message.ack_with(kind).await {
            tracing::debug!(%error, "nothing is said about a ticket");
        }
    }
}
