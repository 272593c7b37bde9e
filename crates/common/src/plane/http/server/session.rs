//! One processor's session: where the deltas of its requests wait for the calls that carry them.
//!
//! Whoever has outputs leaves them in a slot per request, without waiting; each call takes what lies in its own. So
//! a reader that is slow gets deltas merged, and no other notices.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use ahash::AHashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    Code,
    plane::{
        delta,
        server::{Connection, Handler, Outlet},
        stream::{After, Slot},
    },
    proto::worker::{Delta, FinishReason, Load, News, news},
};

/// Deltas with KV to release that wait to be told; more than any processor gives up at once.
const MAX_LATE: usize = 1024;

/// What happens to the requests of one watcher, or of all strangers.
pub(super) struct Session {
    own: Weak<Self>,
    peer: String,
    /// Whether somebody listens to news.
    watched: bool,
    handler: Arc<dyn Handler>,
    connection: OnceLock<Weak<Connection>>,
    state: Mutex<State>,
    changed: Notify,
    closed: CancellationToken,
    /// About how many bytes wait in all slots.
    backlog: Arc<AtomicUsize>,
    max_backlog: usize,
}

#[derive(Default)]
struct State {
    open: AHashMap<u32, Arc<Slot>>,
    last: u32,
    ended: bool,
    load: Option<Load>,
    late: VecDeque<Delta>,
}

impl Outlet for Session {
    fn send(&self, deltas: &mut Vec<Delta>, load: Option<Load>) {
        let mut overflowed = Vec::new();
        let mut news = load.is_some();
        {
            let mut state = self.state.lock();
            if load.is_some() {
                state.load = load;
            }
            for mut delta in deltas.drain(..) {
                let stream = delta.stream;
                let Some(slot) = state.open.get(&stream) else {
                    news |= self.late(&mut state, delta);
                    continue;
                };
                // A call is a stream already.
                delta.stream = 0;
                match slot.put(delta) {
                    After::Open => {}
                    After::Finished => drop(state.open.remove(&stream)),
                    After::Overflowed => {
                        state.open.remove(&stream);
                        overflowed.push(stream);
                    }
                }
            }
        }
        if news {
            self.changed.notify_one();
        }
        // The handler may be in the middle of what it sends this from.
        for stream in overflowed {
            self.later(move |session| session.cancelled(stream));
        }
        let backlog = self.backlog.load(Ordering::Relaxed);
        if backlog > self.max_backlog && !self.closed.is_cancelled() {
            warn!(peer = %self.peer, bytes = backlog, "the processor takes no outputs: ending its session");
            self.closed.cancel();
            self.later(Session::end);
        }
    }

    #[cfg(test)]
    fn waiting_streams(&self) -> usize {
        let state = self.state.lock();
        state.open.values().filter(|slot| slot.is_waiting()).count()
    }
}

impl Session {
    /// Begins a session. Returns it with the connection that stands for it.
    pub(super) fn begin(
        peer: String,
        watched: bool,
        max_backlog: usize,
        handler: Arc<dyn Handler>,
    ) -> (Arc<Self>, Arc<Connection>) {
        let closed = CancellationToken::new();
        let session = Arc::new_cyclic(|own| Self {
            own: own.clone(),
            peer: peer.clone(),
            watched,
            handler,
            connection: OnceLock::new(),
            state: Mutex::default(),
            changed: Notify::new(),
            closed: closed.clone(),
            backlog: Arc::default(),
            max_backlog,
        });
        let connection = Arc::new(Connection::new(peer, session.clone(), closed));
        // Nobody else has seen it yet.
        let _ = session.connection.set(Arc::downgrade(&connection));
        session.handler.opened(&connection);
        (session, connection)
    }

    /// Returns what is cancelled when the session is over.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Opens a stream, under this number or the next free one. Absent: the session is over, or the number taken.
    pub(super) fn open(&self, number: Option<u32>) -> Option<(u32, Arc<Slot>)> {
        let mut state = self.state.lock();
        if state.ended {
            return None;
        }
        let number = match number {
            Some(number) if number == 0 || state.open.contains_key(&number) => return None,
            Some(number) => number,
            None => loop {
                state.last = state.last.wrapping_add(1);
                if state.last != 0 && !state.open.contains_key(&state.last) {
                    break state.last;
                }
            },
        };
        let slot = Arc::new(Slot::counted(self.backlog.clone()));
        state.open.insert(number, slot.clone());
        Some((number, slot))
    }

    /// Nobody reads a stream any more: cancels it unless it has ended, and saves what must not be lost.
    pub(super) fn abandon(&self, stream: u32, slot: &Slot) {
        if self.forget(stream).is_some() {
            self.cancelled(stream);
        }
        if let Some(delta) = slot.take()
            && self.late(&mut self.state.lock(), delta)
        {
            self.changed.notify_one();
        }
    }

    /// Cancels a stream whose reader still listens: its call ends after what lies in its slot.
    pub(super) fn give_up(&self, stream: u32) {
        if let Some(slot) = self.forget(stream) {
            self.cancelled(stream);
            slot.put(Delta {
                finish: FinishReason::Abort.into(),
                ..Delta::default()
            });
        }
    }

    fn forget(&self, stream: u32) -> Option<Arc<Slot>> {
        self.state.lock().open.remove(&stream)
    }

    fn cancelled(&self, stream: u32) {
        if let Some(connection) = self.connection() {
            self.handler.cancel(&connection, stream);
        }
    }

    fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.get().and_then(Weak::upgrade)
    }

    /// Ends the session and all its streams. Nothing comes of saying so again.
    pub(super) fn end(&self) {
        self.closed.cancel();
        let open = {
            let mut state = self.state.lock();
            if std::mem::replace(&mut state.ended, true) {
                return;
            }
            std::mem::take(&mut state.open)
        };
        for slot in open.into_values() {
            slot.put(delta::failed(0, Code::Disconnected, "the session is over"));
        }
        if let Some(connection) = self.connection() {
            self.handler.closed(&connection);
        }
    }

    /// Waits for news: the load of now, or KV that nobody claims. Cancel safe.
    pub(super) async fn news(&self) -> News {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state.lock();
                let late = state.late.pop_front().map(news::News::Late);
                let next = late.or_else(|| state.load.take().map(news::News::Load));
                if next.is_some() {
                    return News { news: next };
                }
            }
            changed.await;
        }
    }

    /// Keeps a delta that nobody reads if KV is held for it. Says whether it did.
    fn late(&self, state: &mut State, delta: Delta) -> bool {
        if delta.kv_transfer_params.is_empty() {
            return false;
        }
        if !self.watched || state.late.len() >= MAX_LATE {
            // The engine's lease ends it.
            debug!(peer = %self.peer, "KV is held for a caller that has gone");
            return false;
        }
        state.late.push_back(delta);
        true
    }

    fn later(&self, then: impl FnOnce(&Session) + Send + 'static) {
        if let Some(session) = self.own.upgrade() {
            tokio::spawn(async move { then(&session) });
        }
    }
}
