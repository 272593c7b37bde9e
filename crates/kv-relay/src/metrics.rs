//! What a relay counts, over all its views.

use metrics::{counter, describe_counter, describe_gauge, gauge};

use crate::mirror::Notice;

const NEWS: &str = "stator_kv_relay_batches_total";
const BLOCKS: &str = "stator_kv_relay_blocks";
const VIEWS: &str = "stator_kv_relay_views";
const REPAIRS: &str = "stator_kv_relay_repairs_total";
const ORPHANS: &str = "stator_kv_relay_orphan_blocks_total";
const SNAPSHOTS: &str = "stator_kv_relay_snapshots_total";

/// Describes them all.
pub(crate) fn describe() {
    describe_counter!(NEWS, "Batches of changes that were published");
    describe_gauge!(BLOCKS, "Blocks that the engines hold, as far as is known");
    describe_gauge!(VIEWS, "Engines that are listened to");
    describe_counter!(
        REPAIRS,
        "What was not as expected, by kind: gap (missed, and had again), restarted (another engine), \
         forgotten (missed for good: the view began anew), unreadable"
    );
    describe_counter!(
        ORPHANS,
        "Blocks left out because the block before them is not known"
    );
    describe_counter!(SNAPSHOTS, "Views told to those who asked");
}

pub(crate) fn published(batches: usize) {
    counter!(NEWS).increment(batches as u64);
}

pub(crate) fn snapshot() {
    counter!(SNAPSHOTS).increment(1);
}

pub(crate) fn notice(notice: Notice) {
    let kind = match notice {
        Notice::Gap => "gap",
        Notice::Restarted => "restarted",
        Notice::Forgotten => "forgotten",
        Notice::Unreadable => "unreadable",
    };
    counter!(REPAIRS, "kind" => kind).increment(1);
}

pub(crate) fn orphans(blocks: u64) {
    if blocks > 0 {
        counter!(ORPHANS).increment(blocks);
    }
}

/// One view's share of the gauges; given back when it is dropped.
#[derive(Default)]
pub(crate) struct Share {
    blocks: usize,
}

impl Share {
    pub(crate) fn new() -> Self {
        gauge!(VIEWS).increment(1.0);
        Self::default()
    }

    pub(crate) fn set(&mut self, blocks: usize) {
        if blocks != self.blocks {
            gauge!(BLOCKS).increment(blocks as f64 - self.blocks as f64);
            self.blocks = blocks;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
        gauge!(VIEWS).decrement(1.0);
    }
}
