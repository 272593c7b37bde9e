//! The golden files: what transformers, tokenizers and vLLM answered (`scripts/golden_text.py`).

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::PathBuf;

use serde_json::Value;
use stator_text::{ModelFiles, SegmentCache, Tokenizer};

/// The models of the golden files.
pub(crate) const MODELS: [&str; 3] = ["byte_level", "sentencepiece", "metaspace"];

/// Reads a golden file.
pub(crate) fn bytes(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Reads a golden file as JSON.
pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&bytes(name)).unwrap()
}

/// Loads a golden model, with room to remember segments or without.
pub(crate) fn tokenizer(model: &str, cache_bytes: usize) -> Tokenizer {
    let files = ModelFiles {
        tokenizer_json: &bytes(&format!("{model}/tokenizer.json")),
        tokenizer_config: Some(&bytes(&format!("{model}/tokenizer_config.json"))),
        ..ModelFiles::default()
    };
    Tokenizer::from_files(
        &files,
        SegmentCache {
            bytes: cache_bytes,
            seed: 7,
        },
    )
    .unwrap()
}

/// Reads a list of ids.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// Runs a property on so many cases. Failures are told, not kept in files.
pub(crate) fn cases(count: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config {
        failure_persistence: None,
        ..proptest::test_runner::Config::with_cases(count)
    }
}
