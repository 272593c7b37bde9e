//! The answers that stream: a request's deltas, and the news of a session.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use prost::Message;
use tokio::time::{self, Interval};
use tonic::Status;

use super::{Session, service::Shared};
use crate::{
    Code,
    plane::{
        SOFTWARE, delta,
        http::{VERSION, status},
        server::Connection,
        stream::Slot,
        tcp::frame::MAX_FRAME,
    },
    proto::worker::{self, Delta, Draining, Greeting, Heartbeat, News, news},
};

/// Deltas below this are not looked at for their size.
const LARGE: usize = 4 << 20;

/// The deltas of one request. Dropping it before the last one cancels the request.
pub(super) struct Deltas {
    session: Arc<Session>,
    /// Keeps the session's identity alive as long as a request runs.
    _connection: Arc<Connection>,
    slot: Arc<Slot>,
    stream: u32,
    /// What the call ends with, after what was generated before.
    failed: Option<Status>,
    ended: bool,
}

impl Deltas {
    pub(super) fn new(
        session: Arc<Session>,
        connection: Arc<Connection>,
        (stream, slot): (u32, Arc<Slot>),
    ) -> Self {
        Self {
            session,
            _connection: connection,
            slot,
            stream,
            failed: None,
            ended: false,
        }
    }

    /// Returns the refusal of a request that was refused at once.
    pub(super) fn refused(&mut self) -> Option<Status> {
        let refusal = self.slot.take_refusal()?;
        self.ended = true;
        refusal.error.as_ref().map(status::of)
    }
}

impl Stream for Deltas {
    type Item = Result<Delta, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(status) = self.failed.take() {
            return Poll::Ready(Some(Err(status)));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let mut delta = ready!(self.slot.poll_take(cx));
        self.ended = delta::is_last(&delta);
        if delta::weight(&delta) > LARGE && delta.encoded_len() > MAX_FRAME {
            let message = "the output of one step is larger than a message may be";
            delta.error = Some(crate::plane::error(Code::TooLarge, message));
            delta.tokens.clear();
            delta.logprobs.clear();
            delta.prompt_logprobs.clear();
        }
        let Some(error) = delta.error.take() else {
            return Poll::Ready(Some(Ok(delta)));
        };
        let status = status::of(&error);
        if delta.tokens.is_empty() && delta.kv_transfer_params.is_empty() {
            return Poll::Ready(Some(Err(status)));
        }
        delta.finish = worker::FinishReason::Unspecified.into();
        self.failed = Some(status);
        Poll::Ready(Some(Ok(delta)))
    }
}

impl Drop for Deltas {
    fn drop(&mut self) {
        if !self.ended {
            self.session.abandon(self.stream, &self.slot);
        }
    }
}

/// What a watcher hears. Dropping it ends the session.
pub(super) struct Watching {
    shared: Arc<Shared>,
    id: u64,
    session: Arc<Session>,
    /// Lives as long as it is watched.
    _connection: Arc<Connection>,
    beat: Interval,
    greeted: bool,
    told_draining: bool,
}

impl Watching {
    /// - `id`: what requests of the session name it by.
    pub(super) fn new(
        shared: Arc<Shared>,
        id: u64,
        (session, connection): (Arc<Session>, Arc<Connection>),
        beat_every: Duration,
    ) -> Self {
        let start = time::Instant::now() + beat_every;
        let mut beat = time::interval_at(start, beat_every);
        beat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        Self {
            shared,
            id,
            session,
            _connection: connection,
            beat,
            greeted: false,
            told_draining: false,
        }
    }

    /// Returns what follows, until the session is over.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<News, Status>> + Send + 'static {
        futures::stream::unfold(self, |mut watching| async move {
            let news = watching.next().await?;
            Some((Ok(news), watching))
        })
    }

    async fn next(&mut self) -> Option<News> {
        if !self.greeted {
            self.greeted = true;
            return Some(of(news::News::Welcome(Greeting {
                worker: self.shared.config.worker.0.clone(),
                software: SOFTWARE.to_owned(),
                session: self.id,
                major: VERSION.0,
                minor: VERSION.1,
            })));
        }
        tokio::select! {
            biased;
            () = self.session.closed().cancelled() => None,
            () = self.shared.drain.draining(), if !self.told_draining => {
                self.told_draining = true;
                Some(of(news::News::Draining(Draining {})))
            }
            news = self.session.news() => Some(news),
            _ = self.beat.tick() => Some(of(news::News::Heartbeat(Heartbeat {}))),
        }
    }
}

fn of(news: news::News) -> News {
    News { news: Some(news) }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.shared.ended(self.id);
        self.session.end();
    }
}
