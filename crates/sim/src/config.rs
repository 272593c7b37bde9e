//! What a simulated engine is: its model, its limits, its pace, and what goes wrong with it.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::model::Model;
use crate::scheduler::{Limits, Plan};
use crate::wire::WireVersion;

/// One simulated engine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the frontend waits for engines, `tcp://host:port`.
    pub handshake: String,
    /// Its rank, and so its identity and its engine index.
    pub dp_rank: u32,
    pub wire: WireVersion,
    /// Unknown fields appended to every output.
    pub extra_fields: usize,
    pub limits: Limits,
    pub model: Model,
    pub timing: Timing,
    /// Absent: no KV events.
    pub kv_events: Option<KvEvents>,
    /// Absent: `kv_transfer_params` are ignored.
    pub connector: Option<Connector>,
    /// Adapters that may be loaded at a time; 0: LoRA is off.
    pub max_loras: usize,
    pub sleep_mode: bool,
    /// Whether outputs carry statistics.
    pub log_stats: bool,
    pub faults: Faults,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Everything takes this many times less; 0: no time at all.
    pub speedup: f64,
    pub prefill_per_token: Duration,
    /// A step in which somebody decodes takes this, plus `decode_per_seq` for each that does.
    pub decode_per_step: Duration,
    pub decode_per_seq: Duration,
    pub transfer_per_token: Duration,
    /// From start to ready.
    pub load: Duration,
}

impl Default for Timing {
    /// About a small model on one GPU.
    fn default() -> Self {
        Self {
            speedup: 1.0,
            prefill_per_token: Duration::from_micros(20),
            decode_per_step: Duration::from_millis(5),
            decode_per_seq: Duration::from_micros(20),
            transfer_per_token: Duration::from_micros(1),
            load: Duration::ZERO,
        }
    }
}

impl Timing {
    /// How long a step takes.
    #[must_use]
    pub fn step(&self, plan: &Plan) -> Duration {
        let mut cost = self.prefill_per_token * clamp(plan.prefill_tokens);
        if plan.decode_seqs > 0 {
            cost += self.decode_per_step + self.decode_per_seq * clamp(plan.decode_seqs);
        }
        self.scaled(cost)
    }

    /// How long fetching the KV of so many tokens takes.
    #[must_use]
    pub fn transfer(&self, tokens: usize) -> Duration {
        self.scaled(self.transfer_per_token * clamp(tokens))
    }

    fn scaled(&self, cost: Duration) -> Duration {
        if self.speedup > 0.0 {
            cost.div_f64(self.speedup)
        } else {
            Duration::ZERO
        }
    }
}

fn clamp(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// `--kv-events-config`; names and defaults are vLLM's (config/kv_events.py).
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct KvEvents {
    pub enable_kv_cache_events: bool,
    pub endpoint: String,
    pub replay_endpoint: Option<String>,
    /// Batches kept for replay.
    pub buffer_steps: usize,
    pub topic: String,
}

impl Default for KvEvents {
    fn default() -> Self {
        Self {
            enable_kv_cache_events: false,
            endpoint: "tcp://*:5557".into(),
            replay_endpoint: None,
            buffer_steps: 10_000,
            topic: String::new(),
        }
    }
}

/// The KV connector: a NIXL that moves no bytes.
#[derive(Clone, Debug)]
pub struct Connector {
    pub engine_id: String,
    /// Where other engines reach this one's side channel; port 0 takes a free one.
    pub host: String,
    pub port: u16,
    /// How long blocks are kept for an engine that does not ask for them.
    pub lease: Duration,
    /// How long it takes to find out that KV cannot be fetched.
    pub failure_delay: Duration,
}

impl Default for Connector {
    fn default() -> Self {
        Self {
            engine_id: format!("sim-{:016x}", rand::random::<u64>()),
            host: "127.0.0.1".into(),
            port: 0,
            lease: Duration::from_secs(30),
            failure_delay: Duration::from_secs(5),
        }
    }
}

/// What goes wrong, counted from the start; absent: nothing does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Ends with an error instead of becoming ready.
    pub fail_to_load: bool,
    /// After so many steps: says `ENGINE_CORE_DEAD` and ends.
    pub die_after_steps: Option<u64>,
    /// After so many steps: ends without a word, as if killed.
    pub vanish_after_steps: Option<u64>,
    /// After so many steps: lives on and does nothing.
    pub hang_after_steps: Option<u64>,
    /// After so many ADDs: hears nothing any more.
    pub deaf_after_adds: Option<u64>,
}

/// What the model's folder says about it.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    pub vocab: u32,
    pub max_model_len: usize,
    pub model: Model,
}

/// Why a model folder is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("read {path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("parse {path}: {source}")]
    Parse {
        path: String,
        source: serde_json::Error,
    },
    #[error("config.json has no vocab_size")]
    NoVocab,
}

#[derive(Deserialize)]
struct ConfigJson {
    vocab_size: Option<u32>,
    max_position_embeddings: Option<usize>,
    text_config: Option<Box<ConfigJson>>,
    eos_token_id: Option<Ids>,
    bos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn list(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Option<Vocabulary>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    special: bool,
}

#[derive(Deserialize)]
struct Vocabulary {
    vocab: Option<Entries>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Entries {
    ById(std::collections::HashMap<String, u32>),
    InOrder(Vec<IgnoredAny>),
}

impl ModelFolder {
    /// Reads `config.json`, and `generation_config.json` and `tokenizer.json` where they exist:
    /// they say which tokens have a text and which of them are special.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let config: ConfigJson = read_json(&folder.join("config.json"))?;
        let text = config.text_config.as_deref().unwrap_or(&config);
        let vocab = text.vocab_size.or(config.vocab_size);
        let vocab = vocab.ok_or(ModelError::NoVocab)?;
        let max_model_len = text.max_position_embeddings.unwrap_or(2048);
        let generation = folder.join("generation_config.json");
        let generation = generation
            .exists()
            .then(|| read_json::<ConfigJson>(&generation))
            .transpose()?;
        let mut special: Vec<u32> = [Some(&config), Some(text), generation.as_ref()]
            .into_iter()
            .flatten()
            .flat_map(|c| [&c.eos_token_id, &c.bos_token_id, &c.pad_token_id])
            .flatten()
            .flat_map(|ids| ids.list().to_vec())
            .collect();
        let mut choices = vocab;
        let tokenizer = folder.join("tokenizer.json");
        if tokenizer.exists() {
            let tokenizer: TokenizerJson = read_json(&tokenizer)?;
            let added = tokenizer.added_tokens.iter();
            special.extend(added.filter(|token| token.special).map(|token| token.id));
            let known = match tokenizer.model.and_then(|model| model.vocab) {
                Some(Entries::ById(ids)) => ids.into_values().max().map_or(0, |id| id + 1),
                Some(Entries::InOrder(entries)) => entries.len() as u32,
                None => vocab,
            };
            choices = choices.min(known);
        }
        special.sort_unstable();
        special.dedup();
        Ok(Self {
            vocab,
            max_model_len,
            model: Model {
                choices,
                special,
                eos_one_in: 0,
            },
        })
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let name = path.display().to_string();
    let text = std::fs::read(path).map_err(|source| ModelError::Read {
        path: name.clone(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| ModelError::Parse { path: name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_tells_which_tokens_may_come_up() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "config.json",
            r#"{"vocab_size": 64, "max_position_embeddings": 4096, "eos_token_id": [2, 3]}"#,
        );
        let plain = ModelFolder::read(folder.path()).unwrap();
        assert_eq!((plain.vocab, plain.max_model_len), (64, 4096));
        assert_eq!((plain.model.choices, plain.model.special), (64, vec![2, 3]));
        write(
            "tokenizer.json",
            r#"{"added_tokens": [{"id": 0, "special": true}, {"id": 5, "special": false}],
                "model": {"vocab": {"a": 4, "b": 59}}}"#,
        );
        let full = ModelFolder::read(folder.path()).unwrap().model;
        assert_eq!((full.choices, full.special), (60, vec![0, 2, 3]));
    }
}
