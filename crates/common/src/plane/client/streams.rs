//! The requests of one connection that have not ended, and where their deltas go.

use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;

use super::Unclaimed;
use crate::{
    plane::{
        PlaneError, delta,
        stream::{After, Slot},
    },
    proto::worker::Delta,
};

/// The open streams of one connection, by number.
pub(in crate::plane) struct Streams {
    table: Mutex<Table>,
    unclaimed: Unclaimed,
}

#[derive(Default)]
struct Table {
    open: AHashMap<u32, Arc<Slot>>,
    last: u32,
    /// The connection is over, and why.
    ended: Option<PlaneError>,
}

impl Streams {
    pub(in crate::plane) fn new(unclaimed: Unclaimed) -> Self {
        Self {
            table: Mutex::default(),
            unclaimed,
        }
    }

    /// Returns how many streams are open.
    pub(in crate::plane) fn len(&self) -> usize {
        self.table.lock().open.len()
    }

    /// Opens a stream. Numbers rise.
    pub(in crate::plane) fn open(&self, slot: &Arc<Slot>) -> Result<u32, PlaneError> {
        let mut table = self.table.lock();
        if let Some(error) = &table.ended {
            return Err(error.clone());
        }
        // After four billion requests numbers start again; one that still runs keeps its own.
        loop {
            table.last = table.last.wrapping_add(1);
            if table.last != 0 && !table.open.contains_key(&table.last) {
                break;
            }
        }
        let stream = table.last;
        table.open.insert(stream, slot.clone());
        Ok(stream)
    }

    /// Runs `then` unless the connection is over; its end waits for that.
    pub(in crate::plane) fn unless_ended(&self, then: impl FnOnce()) -> bool {
        let table = self.table.lock();
        if table.ended.is_some() {
            return false;
        }
        then();
        true
    }

    /// Forgets a stream that nobody reads any more: from here on nothing is put into its slot. Says whether it
    /// had not ended.
    pub(in crate::plane) fn forget(&self, stream: u32) -> bool {
        self.table.lock().open.remove(&stream).is_some()
    }

    /// Hands on what must not be lost of a delta that nobody reads.
    pub(in crate::plane) fn unread(&self, delta: Delta) {
        if !delta.kv_transfer_params.is_empty() {
            (self.unclaimed)(delta);
        }
    }

    /// Gives deltas to their readers. Returns the streams that were ended since their readers are too far behind:
    /// the worker must be told.
    pub(in crate::plane) fn distribute(&self, deltas: Vec<Delta>) -> Vec<u32> {
        let mut overflowed = Vec::new();
        let mut unread = Vec::new();
        {
            let mut table = self.table.lock();
            for delta in deltas {
                let stream = delta.stream;
                // Absent: cancelled a moment ago.
                let Some(slot) = table.open.get(&stream) else {
                    unread.push(delta);
                    continue;
                };
                match slot.put(delta) {
                    After::Open => {}
                    After::Finished => drop(table.open.remove(&stream)),
                    After::Overflowed => {
                        table.open.remove(&stream);
                        overflowed.push(stream);
                    }
                }
            }
        }
        for delta in unread {
            self.unread(delta);
        }
        overflowed
    }

    /// Ends every stream, and those that would be opened.
    pub(in crate::plane) fn end(&self, error: &PlaneError) {
        let open = {
            let mut table = self.table.lock();
            table.ended = Some(error.clone());
            std::mem::take(&mut table.open)
        };
        for (stream, slot) in open {
            slot.put(delta::failed(stream, error.code(), error.to_string()));
        }
    }
}
