//! A model without weights whose tokenizer has one token per byte, so that tokens can be written as text.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use stator_common::BlobHash;
use stator_common::card::{self, File};

/// The token that ends an answer.
pub const END: u32 = 256;
/// Another one that does, by `generation_config.json`.
pub const OTHER_END: u32 = 257;

/// Tokens of the longest prompt and answer together.
pub const MAX_MODEL_LEN: u32 = 512;

/// The bytes and four special tokens.
const VOCAB_SIZE: u32 = 260;

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
    {% if tools %}[{{ tools | map(attribute='function.name') | join(',') }}]{% endif %}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// Files of a model by name.
pub type Files = BTreeMap<String, Bytes>;

/// Returns the files that a processor fetches.
pub fn files() -> Files {
    let added = ["<|end|>", "<|other|>", "<|start|>", "<|pad|>"];
    let added: Vec<Value> = added
        .iter()
        .zip(END..)
        .map(|(content, id)| {
            json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": byte_vocab(), "merges": []},
    });
    let files = [
        ("tokenizer.json", tokenizer.to_string()),
        (
            "tokenizer_config.json",
            json!({"eos_token": "<|end|>"}).to_string(),
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": [END, OTHER_END], "top_k": 7}).to_string(),
        ),
        ("chat_template.jinja", TEMPLATE.to_owned()),
    ];
    files
        .map(|(name, text)| (name.to_owned(), Bytes::from(text)))
        .into()
}

/// Returns what a worker's card says of the model with these files.
pub fn card(files: &Files) -> card::Model {
    card::Model {
        names: vec!["model".to_owned(), "org/alias".to_owned()],
        root: "/models/model".to_owned(),
        max_model_len: MAX_MODEL_LEN,
        vocab_size: VOCAB_SIZE,
        block_size: 16,
        kv_blocks: 64,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        dp_size: 1,
        files: files
            .iter()
            .map(|(name, bytes)| (name.clone(), File::of(bytes)))
            .collect(),
        tool_call_parser: None,
        reasoning_parser: None,
        vllm_version: "0.32.0".to_owned(),
        max_logprobs: 20,
    }
}

/// Returns what a worker's card says of an adapter of the model.
pub fn adapter(name: &str) -> card::Adapter {
    card::Adapter {
        name: name.to_owned(),
        root: format!("/adapters/{name}"),
        parent: "model".to_owned(),
        hash: BlobHash::of(name.as_bytes()),
    }
}

/// Writes the model into a folder that a simulated engine can be started with.
pub fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let config = json!({"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": END});
    let config = ("config.json".to_owned(), Bytes::from(config.to_string()));
    for (name, bytes) in files().into_iter().chain([config]) {
        std::fs::write(folder.path().join(name), bytes).expect("write the model");
    }
    folder
}

/// Returns the tokens of a text: its bytes.
pub fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Every byte, spelled as byte-level vocabularies do: printable ones as they are, the others from U+0100 on.
fn byte_vocab() -> Map<String, Value> {
    let mut next = 0x100;
    let spell = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        }
    };
    (0..=u8::MAX)
        .map(spell)
        .zip(0..)
        .map(|(c, id): (char, u32)| (c.to_string(), id.into()))
        .collect()
}
