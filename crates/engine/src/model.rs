//! Where a model's files are on this machine, and how many tokens it knows.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::adapter;

/// Returns the folder of a model as vLLM resolves it: a path, or a repository name whose snapshot is in
/// the Hugging Face cache. `None` if there is neither.
pub fn folder(model: &str) -> Option<PathBuf> {
    folder_with(model, "config.json")
}

/// Returns the folder of a LoRA adapter, in the same way.
pub fn adapter_folder(name: &str) -> Option<PathBuf> {
    folder_with(name, adapter::CONFIG)
}

fn folder_with(name: &str, file: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.join(file).is_file() {
        return fs::canonicalize(path).ok();
    }
    let repository = cache()?.join(format!("models--{}", name.replace('/', "--")));
    let revision = fs::read_to_string(repository.join("refs/main")).ok()?;
    let snapshot = repository.join("snapshots").join(revision.trim());
    snapshot.join(file).is_file().then_some(snapshot)
}

/// The cache as `huggingface_hub` finds it.
fn cache() -> Option<PathBuf> {
    let path = |key| {
        env::var_os(key)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    path("HF_HUB_CACHE")
        .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(path("HF_HOME")?.join("hub")))
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .or_else(|| Some(path("HOME")?.join(".cache/huggingface/hub")))
}

/// Returns the number of tokens that the model in `folder` knows, from its `config.json`. A
/// multimodal model says it in the configuration of its text part.
pub fn vocab_size(folder: &Path) -> Option<u32> {
    number(folder, "vocab_size")
}

/// Returns the number of attention heads of a layer, which are spread over the devices of an engine.
pub fn attention_heads(folder: &Path) -> Option<u32> {
    number(folder, "num_attention_heads")
}

/// Returns the number of experts of a layer; 0 for a dense model. By the names that vLLM looks for
/// (`get_num_experts`, 0.32).
pub fn experts(folder: &Path) -> u32 {
    config(folder).map_or(0, |config| experts_of(&config))
}

/// The same from a configuration that was read.
pub(crate) fn experts_of(config: &Value) -> u32 {
    let names = [
        "num_experts",
        "moe_num_experts",
        "n_routed_experts",
        "num_local_experts",
    ];
    let mut counts = names.into_iter().filter_map(|name| number_of(config, name));
    counts.next().unwrap_or(0)
}

/// Says whether some layers keep a state in place of KV, as far as the names in its configuration tell: in such a
/// model vLLM may make blocks larger than it was told (`_align_hybrid_block_size`, 0.32).
pub fn is_hybrid(folder: &Path) -> bool {
    let text = fs::read_to_string(folder.join("config.json")).unwrap_or_default();
    ["mamba", "ssm_", "linear_", "conv_", "hybrid", "rwkv"]
        .iter()
        .any(|name| text.contains(name))
}

/// Reads a number of a model's text part.
fn number(folder: &Path, key: &str) -> Option<u32> {
    number_of(&config(folder)?, key)
}

fn config(folder: &Path) -> Option<Value> {
    let text = fs::read_to_string(folder.join("config.json")).ok()?;
    serde_json::from_str(&text).ok()
}

fn number_of(config: &Value, key: &str) -> Option<u32> {
    [
        "",
        "text_config",
        "llm_config",
        "language_config",
        "thinker_config",
    ]
    .into_iter()
    .filter_map(|part| {
        if part.is_empty() {
            Some(config)
        } else {
            config.get(part)
        }
    })
    .find_map(|part| part.get(key)?.as_u64())
    .and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_is_found_in_the_text_part_of_a_multimodal_model() {
        let dir = tempfile::tempdir().expect("temporary folder");
        assert_eq!(vocab_size(dir.path()), None);
        let write = |text| fs::write(dir.path().join("config.json"), text).expect("write");
        write(r#"{"vocab_size": 415}"#);
        assert_eq!(vocab_size(dir.path()), Some(415));
        assert!(!is_hybrid(dir.path()));
        write(r#"{"layer_types": ["linear_attention"]}"#);
        assert!(is_hybrid(dir.path()));
        write(r#"{"text_config": {"vocab_size": 7}}"#);
        assert_eq!(vocab_size(dir.path()), Some(7));
        assert_eq!(
            folder(dir.path().to_str().expect("path")).as_deref(),
            Some(dir.path())
        );
    }
}
