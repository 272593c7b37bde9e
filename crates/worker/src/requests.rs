//! Whose request is whose: the requests that run in one engine, until it ends.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ahash::AHashMap;
use parking_lot::Mutex;
use stator_common::{plane::Connection, proto::worker::Leg};
use stator_engine::{Prepared, RequestHandle, RequestKey, SubmitError};
use tokio::{sync::Notify, task::AbortHandle, time::Instant};

use crate::{line::Work, plan::Progress};

/// How long the answer to a request that was given up is waited for: it left the engine before that heard of it,
/// so one long step is enough.
const LATE_FOR: Duration = Duration::from_secs(60);

/// Requests given up whose answer is waited for, at most; the oldest are forgotten first.
const LATE_MOST: usize = 4096;

/// A request that runs.
pub(crate) struct Running {
    pub(crate) connection: Arc<Connection>,
    pub(crate) stream: u32,
    /// When it came.
    pub(crate) since: Instant,
    pub(crate) progress: Progress,
    /// What it has to compute.
    work: Work,
    /// Dropping it aborts the request in the engine, unless it has ended.
    handle: RequestHandle,
    _deadline: Option<Timer>,
    /// Watches over the KV that it is to fetch.
    guard: Option<Timer>,
    _counted: Counted,
}

/// Ends with its request.
struct Timer(AbortHandle);

impl Drop for Timer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The requests of one engine.
#[derive(Default)]
pub(crate) struct Requests {
    tables: Mutex<Tables>,
}

#[derive(Default)]
pub(crate) struct Tables {
    by_key: AHashMap<RequestKey, Running>,
    by_stream: AHashMap<(u64, u32), RequestKey>,
    /// Given up, the oldest in front.
    late: VecDeque<Late>,
}

/// A request that was given up, whose answer may have been on its way.
pub(crate) struct Late {
    pub(crate) connection: Arc<Connection>,
    pub(crate) stream: u32,
    pub(crate) progress: Progress,
    since: Instant,
    handle: RequestHandle,
}

/// How many requests run in all engines of a worker.
#[derive(Default)]
pub(crate) struct Count {
    running: AtomicUsize,
    none: Notify,
    /// That one ended; for one who waits for that.
    left: Notify,
}

/// Counts one request, from before it is admitted to its end.
pub(crate) struct Counted(Arc<Count>);

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
        self.0.left.notify_one();
    }
}

impl Count {
    /// Counts one request more.
    pub(crate) fn enter(self: &Arc<Self>) -> Counted {
        self.running.fetch_add(1, Ordering::AcqRel);
        Counted(self.clone())
    }

    pub(crate) fn get(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    /// Waits until a request has ended since the last time. For one who waits. Cancel safe.
    pub(crate) async fn left(&self) {
        self.left.notified().await;
    }

    /// Waits until nothing runs. Cancel safe.
    pub(crate) async fn none(&self) {
        loop {
            let none = self.none.notified();
            tokio::pin!(none);
            none.as_mut().enable();
            if self.get() == 0 {
                return;
            }
            none.await;
        }
    }
}

impl Requests {
    /// Returns how many requests run in this engine.
    pub(crate) fn len(&self) -> usize {
        self.tables.lock().by_key.len()
    }

    /// Returns how many requests run in this engine, and the tokens that those have to compute which are not answered
    /// yet.
    pub(crate) fn work(&self) -> (u64, u64) {
        let tables = self.tables.lock();
        let unanswered = tables.by_key.values();
        let unanswered = unanswered.filter(|running| !running.progress.started);
        let tokens = unanswered.map(|running| running.work.load(Ordering::Relaxed));
        // Some come from others.
        (
            tables.by_key.len() as u64,
            tokens.fold(0, u64::saturating_add),
        )
    }

    /// Sends a request to the engine. Under the lock, because its first output may come at once.
    ///
    /// `late` is run once, `deadline` after `since`, if the request still runs then.
    pub(crate) fn start(
        self: &Arc<Self>,
        prepared: Prepared,
        counted: Counted,
        (connection, stream): (&Arc<Connection>, u32),
        (leg, prompt_tokens, work): (Leg, u32, Work),
        deadline: Option<Duration>,
        late: impl FnOnce(Running) + Send + 'static,
    ) -> Result<(), SubmitError> {
        let key = prepared.key();
        let since = Instant::now();
        let mut tables = self.tables.lock();
        let handle = prepared.send()?;
        let deadline = deadline.map(|deadline| {
            let requests = Arc::downgrade(self);
            let timer = tokio::spawn(async move {
                tokio::time::sleep_until(since + deadline).await;
                if let Some(running) = requests.upgrade().and_then(|all| all.take(key)) {
                    late(running);
                }
            });
            Timer(timer.abort_handle())
        });
        tables.by_stream.insert((connection.id(), stream), key);
        tables.by_key.insert(
            key,
            Running {
                connection: connection.clone(),
                stream,
                since,
                progress: Progress {
                    leg,
                    started: false,
                    prompt_tokens,
                },
                work,
                handle,
                _deadline: deadline,
                guard: None,
                _counted: counted,
            },
        );
        Ok(())
    }

    /// Looks at all requests under one lock.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut Tables) -> R) -> R {
        look(&mut self.tables.lock())
    }

    /// Ends a task that watches over a request when the request ends.
    pub(crate) fn guard(&self, key: RequestKey, task: AbortHandle) {
        let timer = Timer(task);
        if let Some(running) = self.tables.lock().get(key) {
            running.guard = Some(timer);
        }
    }

    /// Takes one request out; dropping it aborts it.
    pub(crate) fn take(&self, key: RequestKey) -> Option<Running> {
        self.tables.lock().take(key)
    }

    /// Takes the request of a stream out.
    pub(crate) fn take_stream(&self, connection: &Connection, stream: u32) -> Option<Running> {
        let mut tables = self.tables.lock();
        let key = tables.by_stream.get(&(connection.id(), stream)).copied()?;
        tables.take(key)
    }

    /// Aborts a request in the engine, but keeps in mind whose it was for as long as an answer may still come.
    pub(crate) fn give_up(&self, running: Running) {
        running.handle.stop();
        let now = Instant::now();
        let late = &mut self.tables.lock().late;
        while late.len() >= LATE_MOST || late.front().is_some_and(|late| late.is_over(now)) {
            late.pop_front();
        }
        late.push_back(Late {
            connection: running.connection,
            stream: running.stream,
            progress: running.progress,
            since: now,
            handle: running.handle,
        });
    }

    /// Takes all requests of a connection out.
    pub(crate) fn take_connection(&self, connection: &Connection) -> Vec<Running> {
        let mut tables = self.tables.lock();
        tables
            .late
            .retain(|late| late.connection.id() != connection.id());
        drop(tables);
        self.take_if(|running| running.connection.id() == connection.id())
    }

    /// Takes all requests out.
    pub(crate) fn take_all(&self) -> Vec<Running> {
        self.take_if(|_| true)
    }

    fn take_if(&self, of: impl Fn(&Running) -> bool) -> Vec<Running> {
        let mut tables = self.tables.lock();
        let keys: Vec<RequestKey> = tables
            .by_key
            .iter()
            .filter(|(_, running)| of(running))
            .map(|(key, _)| *key)
            .collect();
        keys.into_iter()
            .filter_map(|key| tables.take(key))
            .collect()
    }
}

impl Late {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.since) > LATE_FOR
    }
}

impl Tables {
    /// Takes a request out that was given up.
    pub(crate) fn take_late(&mut self, key: RequestKey) -> Option<Late> {
        let at = self.late.iter().position(|late| late.handle.key() == key)?;
        self.late.remove(at)
    }

    pub(crate) fn get(&mut self, key: RequestKey) -> Option<&mut Running> {
        self.by_key.get_mut(&key)
    }

    pub(crate) fn take(&mut self, key: RequestKey) -> Option<Running> {
        let running = self.by_key.remove(&key)?;
        self.by_stream
            .remove(&(running.connection.id(), running.stream));
        Some(running)
    }
}
