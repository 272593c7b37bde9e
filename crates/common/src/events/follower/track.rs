//! What a subscriber knows of one view, and what it needs to know more. No clock and no sockets.

use std::collections::BTreeMap;

use tracing::debug;

use super::Update;
use crate::{
    events::view::{Blocks, Change, Medium},
    proto::kv,
};

/// Batches that are kept while a snapshot is on its way. Beyond, they are dropped, and the hole is found
/// when the snapshot is there.
const TAIL_MOST: usize = 4096;

/// What is known of one view: the part of a [`Follower`](super::Follower) that decides.
#[derive(Debug)]
pub struct Track {
    state: State,
    /// The number of the latest question.
    asked: u64,
}

#[derive(Debug)]
enum State {
    /// A snapshot is needed, then what came since.
    Waiting {
        tail: Vec<kv::Batch>,
        snapshot: Option<Partial>,
    },
    /// All is known up to this batch.
    Following { epoch: u64, seq: u64 },
}

/// The pieces of a snapshot that are there.
#[derive(Debug)]
struct Partial {
    epoch: u64,
    seq: u64,
    blocks: BTreeMap<Medium, Vec<u64>>,
}

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Next {
    /// To tell whoever listens, in order.
    pub tell: Vec<Update>,
    /// Whether to ask for a snapshot now.
    pub ask: bool,
    /// Whether the relay said that it has no such view: ask again later.
    pub unknown: bool,
}

impl Default for Track {
    fn default() -> Self {
        Self {
            state: State::Waiting {
                tail: Vec::new(),
                snapshot: None,
            },
            asked: 0,
        }
    }
}

impl Track {
    /// Says whether a snapshot is needed.
    pub fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }

    /// Returns the number for the next question; answers to earlier ones do not count any more.
    pub fn question(&mut self) -> u64 {
        self.wait(Vec::new());
        self.asked += 1;
        self.asked
    }

    /// Takes note that anything may have been missed.
    pub fn missed(&mut self) {
        self.wait(Vec::new());
    }

    fn wait(&mut self, with: Vec<kv::Batch>) {
        match &mut self.state {
            State::Waiting { tail, snapshot } => {
                tail.extend(with);
                *snapshot = None;
            }
            State::Following { .. } => {
                self.state = State::Waiting {
                    tail: with,
                    snapshot: None,
                };
            }
        }
    }

    /// Takes what was published.
    pub fn batch(&mut self, batch: kv::Batch) -> Next {
        let (epoch, seq) = match &mut self.state {
            State::Waiting { tail, .. } => {
                if tail.len() == TAIL_MOST {
                    tail.clear();
                }
                tail.push(batch);
                return Next::default();
            }
            State::Following { epoch, seq } => (*epoch, seq),
        };
        let heartbeat = batch.changes.is_empty();
        let expected = *seq + u64::from(!heartbeat);
        if batch.epoch == epoch && batch.seq < expected {
            // Heard before.
            return Next::default();
        }
        if batch.epoch == epoch && batch.seq == expected {
            let changes: Result<Vec<_>, _> =
                batch.changes.into_iter().map(Change::from_proto).collect();
            if let Ok(changes) = changes {
                *seq = expected;
                let tell = changes.into_iter().flatten().map(Update::Changed);
                return Next {
                    tell: tell.collect(),
                    ..Next::default()
                };
            }
            // A change that is not understood: the snapshot after it is.
            self.wait(Vec::new());
        } else {
            debug!(epoch, expected, got = batch.seq, "missed news");
            self.wait(vec![batch]);
        }
        Next {
            ask: true,
            ..Next::default()
        }
    }

    /// Takes a piece of an answer.
    pub fn answer(&mut self, part: kv::SnapshotPart) -> Next {
        let State::Waiting { tail, snapshot } = &mut self.state else {
            return Next::default();
        };
        if part.number != self.asked {
            return Next::default();
        }
        if part.unknown {
            return Next {
                unknown: true,
                ..Next::default()
            };
        }
        let partial = snapshot.get_or_insert_with(|| Partial {
            epoch: part.epoch,
            seq: part.seq,
            blocks: BTreeMap::new(),
        });
        if let Some(Blocks { medium, hashes }) = part.blocks.and_then(Blocks::from_proto) {
            partial.blocks.entry(medium).or_default().extend(hashes);
        }
        if !part.last {
            return Next::default();
        }
        let tail = std::mem::take(tail);
        let Some(Partial { epoch, seq, blocks }) = snapshot.take() else {
            return Next::default();
        };
        self.state = State::Following { epoch, seq };
        let blocks = blocks
            .into_iter()
            .map(|(medium, hashes)| Blocks { medium, hashes })
            .collect();
        let mut next = Next {
            tell: vec![Update::Reset { epoch, blocks }],
            ..Next::default()
        };
        self.catch_up(epoch, tail, &mut next);
        next
    }

    /// Takes what was published while the snapshot was on its way.
    fn catch_up(&mut self, epoch: u64, tail: Vec<kv::Batch>, next: &mut Next) {
        // The last one may be of an epoch that began after the snapshot, or of one that ended before it: the
        // next snapshot tells. Where earlier ones are, the ones after them tell.
        let other = tail.last().is_some_and(|batch| batch.epoch != epoch);
        let mut own = tail.into_iter().filter(|batch| batch.epoch == epoch);
        while let Some(batch) = own.next() {
            let Next { tell, ask, .. } = self.batch(batch);
            next.tell.extend(tell);
            if ask {
                next.ask = true;
                self.wait(own.collect());
                return;
            }
        }
        if other {
            next.ask = true;
            self.wait(Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(epoch: u64, seq: u64, stored: &[u64]) -> kv::Batch {
        let change = Change::Stored(Blocks {
            medium: Medium::Gpu,
            hashes: stored.to_vec(),
        });
        kv::Batch {
            epoch,
            seq,
            changes: if stored.is_empty() {
                Vec::new()
            } else {
                vec![change.to_proto()]
            },
            ..kv::Batch::default()
        }
    }

    fn snapshot(number: u64, epoch: u64, seq: u64, hashes: &[u64], last: bool) -> kv::SnapshotPart {
        kv::SnapshotPart {
            number,
            epoch,
            seq,
            blocks: Some(
                Blocks {
                    medium: Medium::Gpu,
                    hashes: hashes.to_vec(),
                }
                .to_proto(),
            ),
            last,
            ..kv::SnapshotPart::default()
        }
    }

    /// What a listener knows after what it was told.
    fn told(next: &Next) -> Vec<u64> {
        let mut all = Vec::new();
        for update in &next.tell {
            match update {
                Update::Reset { blocks, .. } => {
                    all = blocks.iter().flat_map(|b| b.hashes.clone()).collect();
                }
                Update::Changed(Change::Stored(blocks)) => all.extend(&blocks.hashes),
                other => panic!("{other:?}"),
            }
        }
        all
    }

    fn following(epoch: u64, seq: u64) -> Track {
        let mut track = Track::default();
        let number = track.question();
        assert!(!track.answer(snapshot(number, epoch, seq, &[], true)).ask);
        track
    }

    #[test]
    fn what_came_during_a_snapshot_follows_it_once() {
        let mut track = Track::default();
        let number = track.question();
        for seq in [4, 5, 6, 6, 7] {
            assert_eq!(track.batch(batch(1, seq, &[seq])), Next::default());
        }
        assert_eq!(
            track.answer(snapshot(number, 1, 5, &[1, 2], false)),
            Next::default()
        );
        let next = track.answer(snapshot(number, 1, 5, &[3], true));
        assert_eq!(told(&next), [1, 2, 3, 6, 7]);
        assert!(!next.ask);
        assert_eq!(told(&track.batch(batch(1, 8, &[8]))), [8]);
    }

    #[test]
    fn a_hole_is_found_by_the_next_batch_or_by_a_heartbeat() {
        assert!(following(1, 5).batch(batch(1, 7, &[7])).ask);
        assert!(following(1, 5).batch(batch(1, 6, &[])).ask);
        assert_eq!(following(1, 5).batch(batch(1, 5, &[])), Next::default());
        assert_eq!(following(1, 5).batch(batch(1, 5, &[5])), Next::default());
    }

    #[test]
    fn another_epoch_is_asked_for_until_the_answer_is_of_it() {
        let mut track = following(1, 5);
        assert!(track.batch(batch(2, 1, &[1])).ask);
        let number = track.question();
        // Answered before the epoch began.
        let next = track.answer(snapshot(number, 1, 6, &[9], true));
        assert_eq!((told(&next), next.ask), (vec![9], true));
        let number = track.question();
        let next = track.answer(snapshot(number, 2, 1, &[1], true));
        assert_eq!((told(&next), next.ask), (vec![1], false));
    }

    #[test]
    fn answers_to_earlier_questions_do_not_count() {
        let mut track = Track::default();
        let first = track.question();
        let second = track.question();
        assert_eq!(
            track.answer(snapshot(first, 1, 1, &[1], true)),
            Next::default()
        );
        assert!(track.is_waiting());
        assert_eq!(told(&track.answer(snapshot(second, 1, 2, &[2], true))), [2]);
    }

    #[test]
    fn a_long_wait_keeps_a_bounded_tail_and_asks_again() {
        let mut track = Track::default();
        let number = track.question();
        for seq in 1..=TAIL_MOST as u64 + 1 {
            track.batch(batch(1, seq, &[seq]));
        }
        assert!(track.answer(snapshot(number, 1, 0, &[], true)).ask);
    }
}
