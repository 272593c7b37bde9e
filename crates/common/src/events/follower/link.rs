//! One worker's relay: connected, listened to, asked, and connected again.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Event, Update,
    track::{Next, Track},
};
use crate::{
    WorkerId,
    card::Relay,
    events::{
        plane::{self, Feed, Heard, PlaneError},
        view::{ViewId, topics},
    },
    nats::Nats,
    proto::kv,
};

/// How long a follower waits for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The wait before a relay that cannot be reached is tried again; it doubles up to `connect_most`. Default
    /// 100 ms.
    pub connect_first: Duration,
    /// Default 2 s.
    pub connect_most: Duration,
    /// How long a question may go unanswered before it is asked again. Default 3 s.
    pub answer: Duration,
    /// How long a relay that does not know a view is left alone. Default 300 ms.
    pub unknown: Duration,
    /// Silence after which a view is lost and its relay connected anew. Default 5 s; relays say something
    /// every second.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect_first: Duration::from_millis(100),
            connect_most: Duration::from_secs(2),
            answer: Duration::from_secs(3),
            unknown: Duration::from_millis(300),
            silence: Duration::from_secs(5),
        }
    }
}

/// Follows one worker.
pub(super) struct Link {
    pub(super) worker: WorkerId,
    pub(super) ranks: u32,
    pub(super) nats: Nats,
    pub(super) relay: Relay,
    pub(super) patience: Patience,
    pub(super) events: mpsc::Sender<Event>,
    /// Ranks whose view is wanted anew.
    pub(super) resyncs: mpsc::Receiver<u32>,
}

/// One view of the worker.
struct View {
    id: ViewId,
    track: Track,
    /// Whether whoever listens believes something of this view.
    told: bool,
    heard: Instant,
    /// When to ask, unless nothing is to be asked.
    ask_at: Option<Instant>,
}

/// Whoever took the events is gone.
struct Nobody;

impl Link {
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut views: Vec<View> = (0..self.ranks).map(|rank| self.view(rank)).collect();
        // Events that cannot be told end it: nobody follows any more.
        tokio::select! {
            _ = self.follow(&mut views) => {}
            () = stop.cancelled() => {}
        }
        for view in &mut views {
            let _ = self.lose(view).await;
        }
    }

    fn view(&self, dp_rank: u32) -> View {
        View {
            id: ViewId {
                worker: self.worker.clone(),
                dp_rank,
            },
            track: Track::default(),
            told: false,
            heard: Instant::now(),
            ask_at: None,
        }
    }

    async fn follow(&mut self, views: &mut [View]) -> Result<(), Nobody> {
        let mut wait = self.patience.connect_first;
        let topics = topics(&self.worker);
        loop {
            match plane::connect(&self.nats, &self.relay, &topics).await {
                Ok(feed) => {
                    debug!(worker = %self.worker, relay = self.relay.endpoint, "follows");
                    let since = Instant::now();
                    let why = self.listen(feed, views).await?;
                    if since.elapsed() > self.patience.connect_most {
                        wait = self.patience.connect_first;
                    }
                    info!(worker = %self.worker, %why, "relay lost; connecting again");
                }
                Err(why) => debug!(worker = %self.worker, %why, "no relay yet"),
            }
            let until = Instant::now() + wait;
            wait = (wait * 2).min(self.patience.connect_most);
            self.lose_silent(views).await?;
            time::sleep_until(until).await;
        }
    }

    /// Listens until the connection is lost, and returns why.
    async fn listen(
        &mut self,
        mut feed: Box<dyn Feed>,
        views: &mut [View],
    ) -> Result<PlaneError, Nobody> {
        let mut heard = Instant::now();
        for view in &mut *views {
            view.track.missed();
            view.ask_at = Some(heard);
        }
        loop {
            let mut due = heard + self.patience.silence;
            for view in &mut *views {
                if view.ask_at.is_some_and(|at| at <= Instant::now())
                    && let Err(why) = self.ask(&mut *feed, view).await
                {
                    return Ok(why);
                }
                due = due.min(view.ask_at.unwrap_or(due));
                if view.told {
                    due = due.min(view.heard + self.patience.silence);
                }
            }
            let lost = || PlaneError::Lost {
                endpoint: self.relay.endpoint.clone(),
            };
            tokio::select! {
                message = feed.hear() => match message {
                    Ok(message) => {
                        heard = Instant::now();
                        self.take(message, views).await?;
                    }
                    Err(why) => return Ok(why),
                },
                Some(rank) = self.resyncs.recv() => {
                    if let Some(view) = views.get_mut(rank as usize) {
                        view.track.missed();
                        view.ask_at = Some(Instant::now());
                    }
                }
                () = time::sleep_until(due) => {
                    self.lose_silent(views).await?;
                    if heard.elapsed() >= self.patience.silence {
                        return Ok(lost());
                    }
                }
            }
        }
    }

    async fn ask(&self, feed: &mut dyn Feed, view: &mut View) -> Result<(), PlaneError> {
        view.ask_at = Some(Instant::now() + self.patience.answer);
        let question = kv::SnapshotRequest {
            worker: self.worker.0.clone(),
            dp_rank: view.id.dp_rank,
            number: view.track.question(),
        };
        feed.ask(question.encode_to_vec().into()).await
    }

    async fn take(&self, message: Heard, views: &mut [View]) -> Result<(), Nobody> {
        let (view, next) = match message {
            Heard::News(bytes) => {
                let Some(batch) = read::<kv::Batch>(bytes) else {
                    return Ok(());
                };
                let Some(view) = self.find(views, &batch.worker, batch.dp_rank) else {
                    return Ok(());
                };
                let next = view.track.batch(batch);
                (view, next)
            }
            Heard::Answer(bytes) => {
                let Some(part) = read::<kv::SnapshotPart>(bytes) else {
                    return Ok(());
                };
                let Some(view) = self.find(views, &part.worker, part.dp_rank) else {
                    return Ok(());
                };
                let next = view.track.answer(part);
                (view, next)
            }
        };
        let Next { tell, ask, unknown } = next;
        let now = Instant::now();
        if unknown {
            view.ask_at = Some(now + self.patience.unknown);
            return Ok(());
        }
        view.heard = now;
        if ask {
            view.ask_at = Some(now);
        } else if !view.track.is_waiting() {
            view.ask_at = None;
        }
        for update in tell {
            view.told = true;
            self.tell(view, update).await?;
        }
        Ok(())
    }

    fn find<'a>(&self, views: &'a mut [View], worker: &str, dp_rank: u32) -> Option<&'a mut View> {
        let own = worker == self.worker.0;
        views.get_mut(dp_rank as usize).filter(|_| own)
    }

    async fn lose_silent(&self, views: &mut [View]) -> Result<(), Nobody> {
        for view in views {
            if view.heard.elapsed() >= self.patience.silence {
                self.lose(view).await?;
            }
        }
        Ok(())
    }

    async fn lose(&self, view: &mut View) -> Result<(), Nobody> {
        if !std::mem::take(&mut view.told) {
            return Ok(());
        }
        warn!(view = %view.id, "nothing is known of this cache any more");
        view.track.missed();
        view.ask_at = Some(Instant::now() + self.patience.answer);
        self.tell(view, Update::Lost).await
    }

    async fn tell(&self, view: &View, update: Update) -> Result<(), Nobody> {
        let event = Event {
            view: view.id.clone(),
            update,
        };
        self.events.send(event).await.map_err(|_| Nobody)
    }
}

fn read<M: Message + Default>(bytes: Bytes) -> Option<M> {
    M::decode(bytes)
        .inspect_err(|error| warn!(%error, "a message of a relay cannot be read"))
        .ok()
}
