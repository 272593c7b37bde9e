//! What a worker publishes about itself, once, when it is ready to serve.
//!
//! A card holds everything that a processor needs to serve the worker's model, except the bytes of
//! its files: those are named by content hash and fetched from any worker that has them
//! (`plane::Client::blob`), so no folder need be shared. What changes while a worker
//! runs (its load) is not on the card.

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::ids::{BlobHash, WorkerId};

/// What a worker is and how to reach it. Unknown fields of a newer worker are skipped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// The process; a restarted worker gets a new id.
    pub worker: WorkerId,
    /// What it does.
    pub role: Role,
    /// Where it belongs: `dyn://namespace.component.endpoint`.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `host:port` of its tcp request plane, as others reach it.
    pub address: String,
    /// What it serves.
    pub model: Model,
    /// How the KV of prompts reaches or leaves its engines. Absent on aggregated workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff: Option<HandOff>,
    /// Where it is told what its engines' KV caches hold. Absent: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_events: Option<KvEvents>,
    /// LoRA adapters that its engines serve beside the model. Workers of one model may have different ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<Adapter>,
}

/// A LoRA adapter that clients name as if it were a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// The name it answers to. No model and no other adapter of the worker has it.
    pub name: String,
    /// The folder that the engine loaded.
    pub root: String,
    /// The name of the model that it adapts, one of [`Model::names`].
    pub parent: String,
    /// blake3 of its files: adapters of one name are the same if their hashes are.
    pub hash: BlobHash,
}

/// Where it is told what the KV caches of a worker's engines hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvEvents {
    /// The relay that subscribers ask. Absent: there is none, only what the engines publish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Relay>,
    /// What the engines themselves publish, for the relay of their node. Empty where the relay is in the worker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub engines: Vec<EngineEvents>,
}

/// Where a relay publishes, and where it is asked for snapshots (`proto/README.md`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Relay {
    /// ZMQ PUB, `tcp://host:port` as others reach it.
    pub endpoint: String,
    /// ZMQ ROUTER, likewise.
    pub snapshot_endpoint: String,
}

/// Where one engine publishes its KV events, in its own words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEvents {
    /// The engine's data-parallel rank.
    pub dp_rank: u32,
    /// Name of the machine that it runs on (`process::machine`): endpoints may be files there.
    pub host: String,
    /// ZMQ PUB, `ipc://path` or `tcp://host:port`.
    pub endpoint: String,
    /// ZMQ ROUTER that tells again what was missed. Absent: nothing can be repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_endpoint: Option<String>,
    /// First frame of what is published; mostly empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub topic: String,
}

/// How KV goes from a prefill engine to a decode engine. Two workers fit if connector and protocol are equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOff {
    /// vLLM's name of the connector: `NixlConnector`, `NixlPushConnector`, `LMCacheMPConnector`, ..
    pub connector: String,
    /// Who says where the KV is.
    pub protocol: HandOffProtocol,
    /// Tensor-parallel size of each engine. Those of two engines that hand KV over may differ; one must divide the
    /// other (vLLM 0.32).
    pub tensor_parallel_size: u32,
    /// Milliseconds that a prefill engine keeps KV that nobody fetches.
    pub lease_ms: u64,
    /// Where decode engines find this worker's engines, one per data-parallel rank: a msgpack map in hex,
    /// which becomes the `kv_transfer_params` of decode legs if a prefill's answer brings none. Empty where
    /// answers always do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<String>,
}

/// Who says where KV is to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandOffProtocol {
    /// The prefill engine, in its answer: the decode leg begins when that has come (NIXL's pull).
    #[default]
    ResponseCarried,
    /// Whoever routes, by an id that both legs carry (NIXL's push, Mooncake).
    RouterAllocated,
}

/// What a worker does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Prefill and decode in one engine.
    Agg,
    /// Computes prompts and hands their KV on.
    Prefill,
    /// Continues prompts that a prefill worker computed.
    Decode,
    /// Runs the vision encoder of a multimodal model.
    Encode,
}

/// A named place for workers that do the same: `dyn://namespace.component.endpoint`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// Keeps deployments apart.
    pub namespace: String,
    /// The kind of worker in it.
    pub component: String,
    /// The function that it offers.
    pub endpoint: String,
}

/// The model behind a worker, as its engine runs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The names it answers to; the first is its id. Never empty.
    pub names: Vec<String>,
    /// The path or hub id that the engine loaded.
    pub root: String,
    /// Tokens of prompt and output together, at most.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// KV blocks, summed over the data-parallel ranks.
    pub kv_blocks: u64,
    /// Sequences that one rank runs at once.
    pub max_num_seqs: u32,
    /// Tokens that one rank computes in one step.
    pub max_num_batched_tokens: u32,
    /// Data-parallel ranks; each is a routing target of its own.
    pub dp_size: u32,
    /// Files by name (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`,
    /// `config.json`, `generation_config.json`, `special_tokens_map.json`, whichever exist).
    pub files: BTreeMap<String, File>,
    /// The parser that finds tool calls in this model's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_parser: Option<String>,
    /// The parser that finds reasoning in this model's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_parser: Option<String>,
    /// Of the engine.
    pub vllm_version: String,
    /// Log-probability candidates per position that a request may ask for, at most
    /// (`--max-logprobs`); -1: no limit.
    #[serde(default = "default_max_logprobs")]
    pub max_logprobs: i32,
}

/// vLLM's own default of `--max-logprobs` (0.32, config/model.py).
fn default_max_logprobs() -> i32 {
    20
}

/// A file that the worker serves by its content hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// blake3 of the bytes.
    pub hash: BlobHash,
    /// Bytes.
    pub size: u64,
}

impl Card {
    /// Says whether the worker serves an adapter.
    ///
    /// - `name`: empty: the model itself, which every worker serves.
    pub fn serves(&self, name: &str) -> bool {
        name.is_empty() || self.adapters.iter().any(|adapter| adapter.name == name)
    }
}

impl Model {
    /// Returns a hash over everything that makes two workers interchangeable for a router: names,
    /// limits that validation depends upon, block size and file contents. Capacities and the path do
    /// not enter it.
    pub fn fingerprint(&self) -> BlobHash {
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for name in &self.names {
            put(name.as_bytes());
        }
        put(&self.max_model_len.to_le_bytes());
        put(&self.vocab_size.to_le_bytes());
        put(&self.block_size.to_le_bytes());
        for (name, file) in &self.files {
            put(name.as_bytes());
            put(file.hash.0.as_bytes());
        }
        for parser in [&self.tool_call_parser, &self.reasoning_parser] {
            put(parser.as_deref().unwrap_or_default().as_bytes());
        }
        BlobHash(hasher.finalize().to_hex().to_string())
    }
}

impl File {
    /// Names the given bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            hash: BlobHash::of(bytes),
            size: bytes.len() as u64,
        }
    }

    /// Reads a file and names its bytes.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn read(path: &Path) -> std::io::Result<(Self, Vec<u8>)> {
        let bytes = std::fs::read(path)?;
        Ok((Self::of(&bytes), bytes))
    }
}

impl BlobHash {
    /// Hashes bytes the way blobs are named.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).to_hex().to_string())
    }

    /// Hashes all that can be read, without keeping it.
    ///
    /// # Errors
    /// Those of reading.
    pub fn of_reader(reader: impl std::io::Read) -> std::io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok(Self(hasher.finalize().to_hex().to_string()))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Agg => "agg",
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Encode => "encode",
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "dyn://{}.{}.{}",
            self.namespace, self.component, self.endpoint
        )
    }
}

/// What was expected where an endpoint was to be named.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is not an endpoint: expected dyn://namespace.component.endpoint, each part of letters, digits, '-' and '_'"
)]
pub struct BadEndpoint(String);

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        let bad = || BadEndpoint(text.to_owned());
        let path = text.strip_prefix("dyn://").unwrap_or(text);
        let parts: Vec<&str> = path.split('.').collect();
        match parts[..] {
            [namespace, component, endpoint]
                if [namespace, component, endpoint]
                    .iter()
                    .all(|part| is_name(part)) =>
            {
                Ok(Self {
                    namespace: namespace.to_owned(),
                    component: component.to_owned(),
                    endpoint: endpoint.to_owned(),
                })
            }
            _ => Err(bad()),
        }
    }
}

/// Says whether a text can name a namespace, component or endpoint: they become folder names.
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 128
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_reads_back_as_it_was_written() {
        let endpoint: Endpoint = "dyn://dynamo.backend.generate".parse().unwrap();
        assert_eq!(endpoint.to_string(), "dyn://dynamo.backend.generate");
        assert_eq!(
            "dynamo.backend.generate".parse::<Endpoint>().unwrap(),
            endpoint
        );
    }

    #[test]
    fn an_endpoint_that_could_leave_its_folder_is_refused() {
        for text in ["", "a.b", "a.b.c.d", "../x.b.c", "a..c", "dyn://a/b.c.d"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
