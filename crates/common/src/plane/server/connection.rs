//! One processor's connection, as those see it who have outputs for it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio_util::sync::CancellationToken;

use crate::{
    Code,
    plane::delta,
    proto::worker::{Delta, Load},
};

/// How outputs leave on some plane.
pub(in crate::plane) trait Outlet: Send + Sync {
    /// See [`Connection::send`]. An outlet that cannot go on cancels the token of its connection.
    fn send(&self, deltas: &mut Vec<Delta>, load: Option<Load>);

    /// Returns how many deltas wait because the peer does not read.
    #[cfg(test)]
    fn waiting_streams(&self) -> usize;
}

/// One processor's connection, for whoever has outputs for it.
pub struct Connection {
    id: u64,
    peer: String,
    outlet: Arc<dyn Outlet>,
    closed: CancellationToken,
}

impl Connection {
    /// - `closed`: cancelled when the connection is gone, by whoever finds that first.
    pub(in crate::plane) fn new(
        peer: String,
        outlet: Arc<dyn Outlet>,
        closed: CancellationToken,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            peer,
            outlet,
            closed,
        }
    }

    /// Returns a number that no other connection of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns who is at the other end, for logs.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Says whether the connection is gone. What is sent to it then is dropped.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Sends the deltas of one engine step, at once if the peer takes them, else merged with what already
    /// waits. Never blocks, never fails: a connection that cannot be written to closes. `deltas`
    /// is emptied; its memory stays the caller's.
    pub fn send(&self, deltas: &mut Vec<Delta>, load: Option<Load>) {
        if self.is_closed() || (deltas.is_empty() && load.is_none()) {
            deltas.clear();
            return;
        }
        self.outlet.send(deltas, load);
    }

    /// Sends the load alone.
    pub fn send_load(&self, load: Load) {
        self.send(&mut Vec::new(), Some(load));
    }

    /// Ends a stream with an error.
    pub fn fail(&self, stream: u32, code: Code, message: impl Into<String>) {
        self.send(&mut vec![delta::failed(stream, code, message)], None);
    }

    /// Returns how many deltas wait because the peer does not read.
    #[cfg(test)]
    pub(crate) fn waiting_streams(&self) -> usize {
        self.outlet.waiting_streams()
    }
}
