//! What vLLM tells of its KV cache: read from its publisher, in the order and with the numbers that it gives.
//!
//! An engine with `--kv-events-config` publishes one batch per step that changed its cache. [`Source`] hears
//! batches and asks for those that were missed, [`decode`] says what is in one, [`Publisher`] is the flag. What to
//! make of a gap, and of an engine that starts again, is the caller's to decide.
//!
//! Source of facts: vllm/distributed/kv_events.py, v1/core/block_pool.py, v1/core/kv_cache_utils.py (0.23, 0.32).

mod config;
mod decode;
mod source;

use stator_common::events::Medium;

pub use config::{ConfigError, Publisher, offset};
pub use decode::decode;
pub use source::{Endpoints, Heard, Numbered, Source, SourceError};

/// What one engine step did to the cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Seconds since 1970, by the engine's clock. With the batch's number it tells one engine's life from
    /// the next.
    pub stamp: f64,
    /// In order. Those of a kind that is not known here are left out.
    pub events: Vec<KvEvent>,
    /// The engine's own idea of its rank; dense ranks are all 0.
    pub dp_rank: Option<u32>,
}

/// What happened to the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    Stored(Stored),
    Removed(Removed),
    /// Everything was forgotten.
    ///
    /// An engine publishes events at the end of a step, so this one comes with the step after a `reset_prefix_cache`.
    Cleared,
}

/// Consecutive blocks of one prompt can be found from here on. Told once per copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// The engine's names of the blocks.
    pub hashes: Vec<u64>,
    /// The block before the first of them; `None`: they begin the prompt.
    pub parent: Option<u64>,
    /// `[hashes.len() * block_size]`. Empty where the engine does not know them any more (tiers below the GPU).
    pub tokens: Vec<u32>,
    pub block_size: u32,
    pub place: Place,
    /// Name of the adapter.
    pub lora: Option<String>,
    /// What else makes the blocks what they are: one entry per block, or none at all.
    pub extra_keys: Vec<Vec<ExtraKey>>,
    /// What kind of attention the blocks belong to, where that is told.
    pub spec: Option<Spec>,
}

/// Copies of blocks are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub hashes: Vec<u64>,
    pub place: Place,
}

/// Where blocks lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub medium: Medium,
    /// The group of layers that the blocks belong to; models of one kind of attention have one group.
    pub group: Option<u32>,
    /// Whether they lie on another machine.
    pub remote: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            // What vLLM means where it does not say (before 0.27).
            medium: Medium::Gpu,
            group: None,
            remote: false,
        }
    }
}

/// What kind of attention a group of layers has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spec {
    /// Every block of a prefix is needed, and found by its own.
    Full,
    /// Sliding windows, state-space layers and others, which need only some blocks of a prefix.
    Partial,
}

/// Something beside its tokens that a block's content depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraKey {
    /// An adapter's name or a cache salt.
    Text(String),
    /// Media that stand in for some of the tokens.
    Media {
        id: String,
        /// Where they begin, relative to the block's first token.
        offset: i64,
    },
    /// The digest of embeddings that stand in for the tokens.
    Digest(Vec<u8>),
}
