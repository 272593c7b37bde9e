//! What a view tells: changes collected into numbered batches, and all of it for whoever asks. Pure.

use stator_common::{
    events::{Blocks, Change, ViewId},
    proto::kv,
};

/// Blocks in one batch: beyond, it leaves without waiting for more. 8 KiB of names.
const BATCH_MOST: usize = 1024;

/// Blocks in one piece of a snapshot: 512 KiB of names.
const PIECE: usize = 64 * 1024;

/// What a view has told, and what it has to tell.
#[derive(Debug)]
pub struct Outbox {
    view: ViewId,
    epoch: u64,
    /// Of the latest batch.
    seq: u64,
    pending: Vec<Change>,
    /// Blocks in `pending`.
    size: usize,
}

impl Outbox {
    /// - `epoch`: another one for each life of a view.
    pub fn new(view: ViewId, epoch: u64) -> Self {
        Self {
            view,
            epoch,
            seq: 0,
            pending: Vec::new(),
            size: 0,
        }
    }

    /// Begins another life, with nothing told.
    pub fn begin(&mut self, epoch: u64) {
        *self = Self::new(self.view.clone(), epoch);
    }

    /// Takes a change. Nothing overtakes anything.
    pub fn push(&mut self, change: Change) {
        match (self.pending.last_mut(), change) {
            (Some(Change::Stored(last)), Change::Stored(blocks))
            | (Some(Change::Removed(last)), Change::Removed(blocks))
                if last.medium == blocks.medium =>
            {
                self.size += blocks.hashes.len();
                last.hashes.extend(blocks.hashes);
            }
            (_, change) => {
                self.size += match &change {
                    Change::Stored(blocks) | Change::Removed(blocks) => blocks.hashes.len(),
                    Change::Cleared(_) => 1,
                };
                self.pending.push(change);
            }
        }
    }

    /// Says whether there is something to tell.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Says whether what is to tell should not wait for more.
    pub fn is_full(&self) -> bool {
        self.size >= BATCH_MOST
    }

    /// Takes what is to tell, in batches of bounded size.
    pub fn flush(&mut self) -> Vec<kv::Batch> {
        self.size = 0;
        let mut batches = Vec::new();
        let mut changes = Vec::new();
        let mut size = 0;
        for change in std::mem::take(&mut self.pending) {
            for piece in pieces(change) {
                size += match &piece {
                    Change::Stored(blocks) | Change::Removed(blocks) => blocks.hashes.len(),
                    Change::Cleared(_) => 1,
                };
                changes.push(piece.to_proto());
                if size >= BATCH_MOST {
                    batches.push(self.batch(std::mem::take(&mut changes)));
                    size = 0;
                }
            }
        }
        if !changes.is_empty() {
            batches.push(self.batch(changes));
        }
        batches
    }

    fn batch(&mut self, changes: Vec<kv::Change>) -> kv::Batch {
        self.seq += 1;
        kv::Batch {
            changes,
            ..self.heartbeat()
        }
    }

    /// Returns what says that nothing is new. Only right after [`Outbox::flush`].
    pub fn heartbeat(&self) -> kv::Batch {
        kv::Batch {
            worker: self.view.worker.0.clone(),
            dp_rank: self.view.dp_rank,
            epoch: self.epoch,
            seq: self.seq,
            changes: Vec::new(),
        }
    }

    /// Returns the answer to a question for all of a view, in pieces. Only right after [`Outbox::flush`].
    pub fn snapshot(
        &self,
        number: u64,
        blocks: impl Iterator<Item = Blocks>,
    ) -> Vec<kv::SnapshotPart> {
        let part = kv::SnapshotPart {
            worker: self.view.worker.0.clone(),
            dp_rank: self.view.dp_rank,
            number,
            epoch: self.epoch,
            seq: self.seq,
            ..kv::SnapshotPart::default()
        };
        let mut parts = Vec::new();
        for Blocks { medium, hashes } in blocks {
            for piece in hashes.chunks(PIECE) {
                let hashes = piece.to_vec();
                parts.push(kv::SnapshotPart {
                    blocks: Some(Blocks { medium, hashes }.to_proto()),
                    ..part.clone()
                });
            }
        }
        parts.push(kv::SnapshotPart { last: true, ..part });
        parts
    }
}

/// Splits a change that is larger than a batch.
fn pieces(change: Change) -> Vec<Change> {
    let split = |blocks: Blocks, make: fn(Blocks) -> Change| {
        let Blocks { medium, hashes } = blocks;
        let pieces = hashes.chunks(BATCH_MOST).map(|piece| {
            make(Blocks {
                medium,
                hashes: piece.to_vec(),
            })
        });
        pieces.collect()
    };
    match change {
        Change::Stored(blocks) => split(blocks, Change::Stored),
        Change::Removed(blocks) => split(blocks, Change::Removed),
        Change::Cleared(medium) => vec![Change::Cleared(medium)],
    }
}

#[cfg(test)]
mod tests {
    use stator_common::{WorkerId, events::Medium};

    use super::*;

    fn outbox() -> Outbox {
        let view = ViewId {
            worker: WorkerId("w".to_owned()),
            dp_rank: 1,
        };
        Outbox::new(view, 7)
    }

    fn stored(hashes: std::ops::Range<u64>) -> Change {
        Change::Stored(Blocks {
            medium: Medium::Gpu,
            hashes: hashes.collect(),
        })
    }

    #[test]
    fn batches_are_numbered_bounded_and_in_order() {
        let mut outbox = outbox();
        assert_eq!(outbox.flush(), []);
        outbox.push(stored(0..3));
        outbox.push(stored(3..3000));
        outbox.push(Change::Cleared(None));
        assert!(outbox.is_full());
        let batches = outbox.flush();
        let sizes: Vec<usize> = batches.iter().map(|batch| batch.changes.len()).collect();
        assert_eq!((sizes, batches[2].seq), (vec![1, 1, 2], 3));
        let told: Vec<Change> = batches
            .into_iter()
            .flat_map(|batch| batch.changes)
            .filter_map(|change| Change::from_proto(change).unwrap())
            .collect();
        assert_eq!(told[0], stored(0..1024));
        assert_eq!(told[2..], [stored(2048..3000), Change::Cleared(None)]);
        assert_eq!((outbox.heartbeat().seq, outbox.is_full()), (3, false));
    }

    #[test]
    fn an_answer_has_an_end_even_if_there_is_nothing() {
        let parts = outbox().snapshot(5, std::iter::empty());
        assert_eq!(parts.len(), 1);
        assert!(parts[0].last && parts[0].blocks.is_none());
        let many = Blocks {
            medium: Medium::Cpu,
            hashes: (0..PIECE as u64 + 1).collect(),
        };
        let parts = outbox().snapshot(5, [many].into_iter());
        assert_eq!(parts.len(), 3);
        assert!(parts[..2].iter().all(|part| !part.last && part.number == 5));
    }
}
