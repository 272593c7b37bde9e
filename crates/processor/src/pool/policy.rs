//! How a worker is chosen, as a person says it, and what that means for each stage of a request.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stator_router::{DECODING, Measure, Policy, Weights};

/// How a worker is chosen for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterMode {
    /// One after the other.
    RoundRobin,
    /// Each with the same probability.
    Random,
    /// The one with the fewest unfinished requests.
    LeastLoaded,
    /// By what each worker's KV cache holds, as its relay tells, and by its load. Where none tells it is approx for
    /// that worker.
    Kv,
    /// By what each worker was sent lately, and by its load.
    Approx,
    /// The one that the request names.
    Direct,
}

impl RouterMode {
    /// Says whether it asks what caches hold.
    pub(crate) fn looks_at_caches(self) -> bool {
        match self {
            Self::Kv | Self::Approx => true,
            Self::RoundRobin | Self::Random | Self::LeastLoaded | Self::Direct => false,
        }
    }
}

impl fmt::Display for RouterMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
            Self::Kv => "kv",
            Self::Approx => "approx",
            Self::Direct => "direct",
        })
    }
}

/// What the workers of a pool do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// All of it.
    Whole,
    /// Compute its prompt.
    Prefill,
    /// Generate from a prompt that was computed elsewhere.
    Decode,
}

/// How workers are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// The rule.
    pub mode: RouterMode,
    /// How freely dearer workers are chosen.
    pub temperature: f64,
    /// What a token that a worker decodes from weighs beside one that it must compute.
    pub decode_weight: f64,
    /// How long a session keeps its worker.
    pub session_ttl: Duration,
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            mode: RouterMode::RoundRobin,
            temperature: 0.0,
            decode_weight: DECODING,
            session_ttl: Duration::ZERO,
        }
    }
}

impl Routing {
    /// Returns what the terms of a stage's costs weigh.
    pub(crate) fn weights(&self, stage: Stage) -> Weights {
        let weights = match stage {
            Stage::Whole => Weights {
                decoding: self.decode_weight,
                ..Weights::WHOLE
            },
            Stage::Prefill => Weights::PREFILL,
            Stage::Decode => Weights::DECODE,
        };
        Weights {
            temperature: self.temperature,
            ..weights
        }
    }

    /// Returns what it means for a stage.
    pub(crate) fn policy(&self, stage: Stage) -> Policy {
        match (self.mode, stage) {
            (RouterMode::Kv | RouterMode::Approx, _) => Policy::Kv(self.weights(stage)),
            // A prompt waits for the tokens before it, whatever is done elsewhere.
            (_, Stage::Prefill) => Policy::LeastLoaded(Measure::Tokens),
            (RouterMode::RoundRobin, _) => Policy::RoundRobin,
            (RouterMode::Random, _) => Policy::Random,
            (RouterMode::LeastLoaded | RouterMode::Direct, _) => {
                Policy::LeastLoaded(Measure::Requests)
            }
        }
    }
}
