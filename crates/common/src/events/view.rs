//! What is said about KV caches: views, what is in them, and how they change.

use std::fmt;

use crate::{WorkerId, proto::kv};

/// The KV cache of one data-parallel rank of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ViewId {
    pub worker: WorkerId,
    pub dp_rank: u32,
}

/// Where a block lies, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Medium {
    Gpu,
    Cpu,
    /// Files and stores behind them.
    Storage,
}

/// Blocks on one medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub medium: Medium,
    /// Their names (`router::hash`).
    pub hashes: Vec<u64>,
}

/// What happened to a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Blocks that were not there before, on this medium.
    Stored(Blocks),
    /// Blocks whose last copy on this medium went.
    Removed(Blocks),
    /// Everything went; absent: on every medium.
    Cleared(Option<Medium>),
}

/// A message that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum BadMessage {
    #[error("not a message of stator.kv.v1: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("a change of a kind that is not known")]
    Kind,
}

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.worker, self.dp_rank)
    }
}

impl ViewId {
    /// Returns the topic of a view's news.
    pub fn topic(&self) -> String {
        format!("{}{}", topics(&self.worker), self.dp_rank)
    }
}

/// Returns what the topics of all views of a worker begin with.
pub fn topics(worker: &WorkerId) -> String {
    format!("kv/{worker}/")
}

impl Medium {
    fn to_proto(self) -> kv::Medium {
        match self {
            Self::Gpu => kv::Medium::Gpu,
            Self::Cpu => kv::Medium::Cpu,
            Self::Storage => kv::Medium::Storage,
        }
    }

    /// Reads a medium; `None`: one of a newer relay.
    fn from_proto(number: i32) -> Option<Self> {
        match kv::Medium::try_from(number) {
            Ok(kv::Medium::Gpu) => Some(Self::Gpu),
            Ok(kv::Medium::Cpu) => Some(Self::Cpu),
            Ok(kv::Medium::Storage) => Some(Self::Storage),
            Ok(kv::Medium::Unspecified) | Err(_) => None,
        }
    }
}

impl Blocks {
    /// Writes blocks.
    pub fn to_proto(&self) -> kv::Blocks {
        kv::Blocks {
            medium: self.medium.to_proto().into(),
            hashes: self.hashes.clone(),
        }
    }

    /// Reads blocks; `None`: on a medium of a newer relay.
    pub fn from_proto(blocks: kv::Blocks) -> Option<Self> {
        Some(Self {
            medium: Medium::from_proto(blocks.medium)?,
            hashes: blocks.hashes,
        })
    }
}

impl Change {
    /// Writes a change.
    pub fn to_proto(&self) -> kv::Change {
        use kv::change::Change as Kind;
        let kind = match self {
            Self::Stored(blocks) => Kind::Stored(blocks.to_proto()),
            Self::Removed(blocks) => Kind::Removed(blocks.to_proto()),
            Self::Cleared(medium) => Kind::Cleared(kv::Cleared {
                medium: medium.map(|medium| medium.to_proto().into()),
            }),
        };
        kv::Change { change: Some(kind) }
    }

    /// Reads a change; `None`: on a medium of a newer relay.
    ///
    /// # Errors
    /// [`BadMessage::Kind`]: a kind of a newer relay, which must not be skipped.
    pub fn from_proto(change: kv::Change) -> Result<Option<Self>, BadMessage> {
        use kv::change::Change as Kind;
        Ok(match change.change.ok_or(BadMessage::Kind)? {
            Kind::Stored(blocks) => Blocks::from_proto(blocks).map(Self::Stored),
            Kind::Removed(blocks) => Blocks::from_proto(blocks).map(Self::Removed),
            Kind::Cleared(kv::Cleared { medium: None }) => Some(Self::Cleared(None)),
            Kind::Cleared(kv::Cleared {
                medium: Some(medium),
            }) => Medium::from_proto(medium).map(|medium| Self::Cleared(Some(medium))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_read_back_as_they_were_written() {
        let blocks = Blocks {
            medium: Medium::Cpu,
            hashes: vec![1, u64::MAX],
        };
        for change in [
            Change::Stored(blocks.clone()),
            Change::Removed(blocks),
            Change::Cleared(None),
            Change::Cleared(Some(Medium::Storage)),
        ] {
            let read = Change::from_proto(change.to_proto()).unwrap();
            assert_eq!(read, Some(change));
        }
    }

    #[test]
    fn what_a_newer_relay_adds_is_skipped_where_that_is_safe() {
        let elsewhere = kv::Change {
            change: Some(kv::change::Change::Stored(kv::Blocks {
                medium: 77,
                hashes: vec![1],
            })),
        };
        assert_eq!(Change::from_proto(elsewhere).unwrap(), None);
        assert!(Change::from_proto(kv::Change { change: None }).is_err());
    }

    #[test]
    fn topics_of_one_worker_are_not_anothers() {
        let view = |worker: &str| ViewId {
            worker: WorkerId(worker.to_owned()),
            dp_rank: 1,
        };
        let first = topics(&view("agg-1").worker);
        assert!(view("agg-1").topic().starts_with(&first));
        assert!(!view("agg-12").topic().starts_with(&first));
    }
}
