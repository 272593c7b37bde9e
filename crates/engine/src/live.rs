//! The requests that live in the engine, and the only way to send it anything.
//!
//! One lock covers the table and the sender, so that what happens to a request in the table and what
//! the engine is told about it have the same order. It is held for a table operation and a push into a
//! queue; the receive task takes it once per engine step.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::{
    output::RequestKey,
    sockets::{Sender, Unsent},
    wire::{self, Codec},
};

/// Keys of one life of a worker start here times the number of lives before it. After an adoption the
/// engine may still run requests of an earlier life, and a second live request of the same id kills it.
const KEYS_PER_LIFE: u32 = 1 << 24;
/// Orphans remembered as aborted. Beyond that some are aborted twice, which does no harm.
const MAX_ABORTED: usize = 1 << 16;

/// The requests that live in the engine.
pub(crate) struct Live(Mutex<Table>);

/// The locked table.
pub(crate) struct Table {
    /// `None` once the engine is dead.
    sender: Option<Sender>,
    codec: Arc<Codec>,
    /// Engine ids by key.
    requests: HashMap<u32, String>,
    first_key: u32,
    issued: u32,
    /// Of ours, whose ABORT did not leave.
    unaborted: HashSet<u32>,
    /// Of earlier lives, told to abort.
    aborted: HashSet<Bytes>,
}

/// The engine is dead, or the message did not leave.
#[derive(Debug)]
pub(crate) enum Refused {
    Dead,
    Unsent(Unsent),
}

impl Live {
    /// - `life`: how many workers had this engine before.
    pub(crate) fn new(sender: Sender, codec: Arc<Codec>, life: u32) -> Self {
        Self(Mutex::new(Table {
            sender: Some(sender),
            codec,
            requests: HashMap::new(),
            first_key: life.wrapping_mul(KEYS_PER_LIFE),
            issued: 0,
            unaborted: HashSet::new(),
            aborted: HashSet::new(),
        }))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing under the lock panics halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Returns a key that no live request has.
    pub(crate) fn reserve(&mut self) -> RequestKey {
        loop {
            let key = self.first_key.wrapping_add(self.issued);
            self.issued = self.issued.wrapping_add(1);
            if !self.requests.contains_key(&key) {
                return RequestKey(key);
            }
        }
    }

    /// Sends a request's ADD and takes it into the table.
    pub(crate) fn add(
        &mut self,
        key: RequestKey,
        engine_id: String,
        payload: Bytes,
    ) -> Result<(), Refused> {
        self.send(wire::ADD, payload)?;
        self.requests.insert(key.0, engine_id);
        Ok(())
    }

    /// Ends a live request: it is forgotten, and the engine told. Nothing happens to one that has
    /// ended already.
    ///
    /// The engine sends nothing for an aborted request, not even its end.
    pub(crate) fn cancel(&mut self, key: RequestKey) {
        if let Some(id) = self.requests.remove(&key.0)
            && self.abort(&id).is_err()
        {
            self.unaborted.insert(key.0);
        }
    }

    /// Tells the engine to end a live request, but goes on waiting for it: what it said before it heard of
    /// that is still handed over.
    pub(crate) fn stop(&mut self, key: RequestKey) {
        if let Some(id) = self.requests.get(&key.0).cloned() {
            // Unsent is no harm: the request is cancelled once more when nobody waits any longer.
            let _ = self.abort(&id);
        }
    }

    /// Returns the key of a live request by the engine's id, comparing the whole id.
    pub(crate) fn key_of(&self, engine_id: &[u8]) -> Option<RequestKey> {
        let key = RequestKey::of_engine_id(engine_id)?;
        (self.requests.get(&key.0)?.as_bytes() == engine_id).then_some(key)
    }

    /// Forgets a request that the engine has ended; returns the engine's id of it.
    pub(crate) fn finished(&mut self, key: RequestKey) -> Option<String> {
        self.requests.remove(&key.0)
    }

    /// Deals with output for a request that is not in the table: one of ours that was cancelled a
    /// moment ago is left alone; one of an earlier life is aborted, once.
    ///
    /// - result: whether it was aborted.
    pub(crate) fn orphan(&mut self, engine_id: &Bytes) -> bool {
        if let Some(RequestKey(key)) = RequestKey::of_engine_id(engine_id)
            && key.wrapping_sub(self.first_key) < self.issued
            && !self.unaborted.remove(&key)
        {
            return false;
        }
        let Ok(id) = std::str::from_utf8(engine_id) else {
            return false;
        };
        if self.aborted.contains(engine_id) || self.abort(id).is_err() {
            return false;
        }
        if self.aborted.len() == MAX_ABORTED {
            self.aborted.clear();
        }
        // A copy: the slice would keep the whole message.
        self.aborted.insert(Bytes::copy_from_slice(engine_id));
        true
    }

    /// Takes every live request out of the table. The engine is told to abort them, if it hears.
    pub(crate) fn take_all(&mut self) -> Vec<RequestKey> {
        let requests = std::mem::take(&mut self.requests);
        if !requests.is_empty() {
            let abort = self
                .codec
                .encode_abort(requests.values().map(String::as_str));
            let _ = self.send(wire::ABORT, abort);
        }
        requests.into_keys().map(RequestKey).collect()
    }

    /// Sends a message of one of the types of [`wire`].
    pub(crate) fn send(&mut self, kind: &'static [u8], payload: Bytes) -> Result<(), Refused> {
        let sender = self.sender.as_ref().ok_or(Refused::Dead)?;
        sender.send(kind, payload).map_err(Refused::Unsent)
    }

    /// Lets go of the socket: nothing is sent any more.
    pub(crate) fn close(&mut self) {
        self.sender = None;
    }

    fn abort(&mut self, engine_id: &str) -> Result<(), Refused> {
        let abort = self.codec.encode_abort(std::iter::once(engine_id));
        self.send(wire::ABORT, abort)
    }
}
