//! Splits a command line into our flags and vLLM's.

use serde::Deserialize;

/// A flag of `vllm serve`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct EngineFlag {
    /// All spellings, the long one first.
    pub names: Vec<String>,
    pub arity: Arity,
}

/// What follows a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arity {
    /// Nothing; `--no-x` negates it.
    Flag,
    /// At most one value.
    Optional,
    One,
    /// One value or more.
    Many,
}
