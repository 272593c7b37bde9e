//! What it costs to give a request to a target, in tokens.
//!
//! A token of the unit is one that an engine computes in prefill. What the request waits for is what it must compute
//! itself and what the target still has to compute before; what it slows down, and is slowed down by, is what
//! the target decodes. A cached prefix is not a bonus but work that is not there, so a hot prefix stops attracting
//! as soon as more is queued than it saves.

use std::fmt;

use crate::load::Load;

/// What a token in the host's memory saves of one to compute: it is copied, which is fast but not free (as in
/// Dynamo 1.6, as is the next).
const HOST: f64 = 0.75;
/// What a token further away saves.
const STORAGE: f64 = 0.25;

/// How much of a prompt a target has, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cached {
    /// In the memory that the engine computes with.
    pub device: u64,
    /// After these, in the host's memory.
    pub host: u64,
    /// After these, further away.
    pub storage: u64,
}

/// How much a target runs at once. More waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Requests.
    pub requests: u64,
    /// Tokens of KV.
    pub kv_tokens: u64,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            requests: u64::MAX,
            kv_tokens: u64::MAX,
        }
    }
}

/// What the terms weigh.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// A token of the prompt that has to be computed, or to be fetched from where it was.
    pub uncached: f64,
    /// A token that the target has to compute before.
    pub queued: f64,
    /// A token that the target decodes from.
    pub decoding: f64,
    /// How freely dearer targets are chosen: a target that costs this share of the prompt more than the cheapest
    /// is chosen e times less often. 0: never.
    pub temperature: f64,
}

/// What a token that a target decodes from weighs, unless told otherwise. See docs/benchmarks/router.md for what
/// others do to latencies.
pub const DECODING: f64 = 0.07;
/// What fetching a token's KV weighs beside computing it, on a target that decodes what others computed.
const FETCHING: f64 = 0.1;

impl Weights {
    /// For targets that compute prompts and generate.
    pub const WHOLE: Self = Self {
        uncached: 1.0,
        queued: 1.0,
        decoding: DECODING,
        temperature: 0.0,
    };
    /// For targets that only compute prompts: nothing is decoded there.
    pub const PREFILL: Self = Self {
        decoding: 0.0,
        ..Self::WHOLE
    };
    /// For targets that generate from what others computed: no prompt waits there, and what is cached need not be
    /// fetched. The load is what counts.
    pub const DECODE: Self = Self {
        uncached: FETCHING,
        queued: 1.0,
        decoding: 1.0,
        temperature: 0.0,
    };
}

/// Why a target costs what it does; all in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// Of the prompt.
    pub prompt: u64,
    /// What of it is cached.
    pub cached: Cached,
    /// What of it has to be computed, blocks in slower media counted by what they save.
    pub uncached: u64,
    /// What the target has to compute before.
    pub queued: u64,
    /// What the target decodes from.
    pub decoding: u64,
    /// The weighed sum.
    pub cost: f64,
    /// Whether the request would wait for room.
    pub full: bool,
}

impl Terms {
    /// Returns what a request costs on a target.
    pub(crate) fn new(
        weights: &Weights,
        prompt: u64,
        cached: Cached,
        load: &Load,
        room: Room,
    ) -> Self {
        let slower = HOST * cached.host as f64 + STORAGE * cached.storage as f64;
        let uncached = (prompt.saturating_sub(cached.device) as f64 - slower).max(0.0);
        let cost = weights.uncached * uncached
            + weights.queued * load.prefill_tokens as f64
            + weights.decoding * load.decode_tokens as f64;
        let own = prompt.saturating_sub(cached.device);
        Self {
            prompt,
            cached,
            uncached: uncached as u64,
            queued: load.prefill_tokens,
            decoding: load.decode_tokens,
            cost,
            full: load.requests >= room.requests
                // What does not fit an empty target either is no reason against a target.
                || (load.requests > 0 && load.kv_tokens.saturating_add(own) > room.kv_tokens),
        }
    }
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cached {
            device,
            host,
            storage,
        } = self.cached;
        write!(
            f,
            "cost {:.0}: of {} tokens {device} cached",
            self.cost, self.prompt
        )?;
        if host + storage > 0 {
            write!(f, ", {host} on the host, {storage} further away")?;
        }
        write!(
            f,
            ", {} queued before, {} decoding",
            self.queued, self.decoding
        )?;
        if self.full {
            f.write_str(", full")?;
        }
        Ok(())
    }
}
