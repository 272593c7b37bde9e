//! What a relay makes of what one engine says: order, view and news together. No clock and no sockets, so that any
//! sequence of losses can be played through.

use stator_common::{events::ViewId, proto::kv};
use stator_engine::kv_events::{Batch, Heard, Numbered, decode};
use tracing::warn;

use crate::{
    order::{Order, Verdict},
    outbox::Outbox,
    view::View,
};

/// Batches that wait while an answer is expected. Beyond, they are dropped, and asked for afterwards.
const WAITING_MOST: usize = 4096;

/// One engine's cache, as it is told on.
pub struct Mirror {
    order: Order,
    view: View,
    outbox: Outbox,
    /// Whether the engine of now can be asked for what was missed.
    repairs: bool,
    /// Whether all is known that the engine had told when it was first heard.
    synced: bool,
    /// Published while an answer was expected.
    waiting: Vec<Numbered>,
    notices: Vec<Notice>,
    epochs: Box<dyn FnMut() -> u64 + Send + Sync>,
}

/// Something to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// Something was missed, and asked for.
    Gap,
    /// The engine is another one: the view begins anew.
    Restarted,
    /// Something was missed that the engine does not know any more: the view begins anew with what it knows.
    Forgotten,
    /// A batch could not be read: the view goes on with nothing.
    Unreadable,
}

impl Mirror {
    /// - `epochs`: gives numbers that no other life of this view has.
    pub fn new(view: ViewId, mut epochs: impl FnMut() -> u64 + Send + Sync + 'static) -> Self {
        let outbox = Outbox::new(view, epochs());
        Self {
            order: Order::default(),
            view: View::default(),
            outbox,
            repairs: false,
            synced: false,
            waiting: Vec::new(),
            notices: Vec::new(),
            epochs: Box::new(epochs),
        }
    }

    /// Takes note of a new connection. Returns the number to ask from.
    ///
    /// - `repairs`: whether the engine can be asked.
    pub fn connected(&mut self, repairs: bool) -> Option<u64> {
        self.repairs = repairs;
        self.order.forget_question();
        self.waiting.clear();
        // Without anybody to ask, a first batch that is not the first tells.
        self.synced |= !repairs;
        self.check()
    }

    /// Looks whether something was missed that nothing since has shown, and whether the engine is still the same.
    /// Returns the number to ask from.
    pub fn check(&mut self) -> Option<u64> {
        let ask = self.repairs && !self.order.is_asking();
        ask.then(|| self.order.ask())
    }

    /// Says whether an answer is expected.
    pub fn is_asking(&self) -> bool {
        self.order.is_asking()
    }

    /// Says whether what is known may be told to those who ask.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Takes what the engine says. Returns the number to ask from, if something is to be asked.
    pub fn heard(&mut self, heard: Heard) -> Option<u64> {
        match heard {
            Heard::Live(batch) if self.order.is_asking() => {
                if self.waiting.len() < WAITING_MOST {
                    self.waiting.push(batch);
                }
                None
            }
            Heard::Live(batch) => self.live(batch),
            Heard::Again(batch) => {
                let (stamp, read) = read(&batch);
                let verdict = self.order.again(batch.seq, stamp);
                self.take(verdict, read)
            }
            Heard::AgainEnd => {
                let verdict = self.order.answered();
                if verdict != Verdict::Skip {
                    return self.take(verdict, None);
                }
                self.synced = true;
                let mut waiting = std::mem::take(&mut self.waiting).into_iter();
                while let Some(batch) = waiting.next() {
                    if let Some(from) = self.live(batch) {
                        self.waiting = waiting.collect();
                        return Some(from);
                    }
                }
                None
            }
        }
    }

    fn live(&mut self, batch: Numbered) -> Option<u64> {
        let (stamp, read) = read(&batch);
        let verdict = self.order.live(batch.seq, stamp, self.repairs);
        if verdict == Verdict::Ask {
            self.notices.push(Notice::Gap);
            self.waiting.push(batch);
            return Some(self.order.ask());
        }
        let unasked = !self.repairs;
        let lost = matches!(verdict, Verdict::Restarted | Verdict::Forgotten);
        let next = self.take(verdict, read);
        if unasked && lost {
            // It is the first one that is known of the next life.
            return self.live(batch);
        }
        next
    }

    fn take(&mut self, verdict: Verdict, batch: Option<Batch>) -> Option<u64> {
        match verdict {
            Verdict::Skip => {}
            Verdict::Ask => return Some(self.order.ask()),
            Verdict::Restarted => self.begin(Notice::Restarted),
            Verdict::Forgotten => self.begin(Notice::Forgotten),
            Verdict::ApplyPartial => {
                self.notices.push(Notice::Forgotten);
                self.apply(batch);
            }
            Verdict::Apply => self.apply(batch),
        }
        match verdict {
            // Its own answer, if one is still coming, is ended first.
            Verdict::Restarted | Verdict::Forgotten if !self.order.is_asking() => self.check(),
            _ => None,
        }
    }

    fn begin(&mut self, why: Notice) {
        self.notices.push(why);
        self.order.begin();
        self.view = View::default();
        self.outbox.begin((self.epochs)());
    }

    fn apply(&mut self, batch: Option<Batch>) {
        let outbox = &mut self.outbox;
        match batch {
            Some(batch) => {
                for event in &batch.events {
                    self.view.apply(event, &mut |change| outbox.push(change));
                }
            }
            None => {
                self.notices.push(Notice::Unreadable);
                self.view.clear();
                outbox.push(stator_common::events::Change::Cleared(None));
            }
        }
    }

    /// Returns what there is to count since the last call.
    pub fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Says whether there is something to tell, and whether it should wait for more.
    pub fn pending(&self) -> Pending {
        match (self.outbox.is_empty(), self.outbox.is_full()) {
            (true, _) => Pending::Nothing,
            (false, false) => Pending::Some,
            (false, true) => Pending::Full,
        }
    }

    /// Takes what there is to tell.
    pub fn flush(&mut self) -> Vec<kv::Batch> {
        self.outbox.flush()
    }

    /// Returns what says that nothing is new. Only right after [`Mirror::flush`].
    pub fn heartbeat(&self) -> kv::Batch {
        self.outbox.heartbeat()
    }

    /// Returns all of the view. Only right after [`Mirror::flush`].
    pub fn snapshot(&self, number: u64) -> Vec<kv::SnapshotPart> {
        self.outbox.snapshot(number, self.view.blocks())
    }

    /// Returns the view.
    pub fn view(&self) -> &View {
        &self.view
    }
}

/// Whether there is something to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    Nothing,
    /// Not much: more may come with it.
    Some,
    /// Enough for a batch.
    Full,
}

/// Reads a batch, and the bits of its time; nothing, if it cannot be read.
fn read(batch: &Numbered) -> (u64, Option<Batch>) {
    match decode(&batch.payload) {
        Ok(read) => (read.stamp.to_bits(), Some(read)),
        Err(error) => {
            warn!(seq = batch.seq, %error, "an engine's KV events cannot be read");
            (0, None)
        }
    }
}
