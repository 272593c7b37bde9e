//! What the files of a model say about its tokens: the special ones by name, and which end a text.
//!
//! The rules are those of Hugging Face transformers 5 (`tokenization_utils_base.py::_from_pretrained`,
//! `tokenization_utils_tokenizers.py::TokenizersBackend.__init__`), for tokenizers that have a
//! `tokenizer.json`. Defaults that only a model's own Python class knows are not known here.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::tokenizer::LoadError;

/// The files of a model that text needs, as bytes. Only `tokenizer_json` must be there.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModelFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer_json: &'a [u8],
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a [u8]>,
    /// `config.json`.
    pub config: Option<&'a [u8]>,
    /// `generation_config.json`.
    pub generation_config: Option<&'a [u8]>,
    /// `chat_template.jinja`.
    pub chat_template: Option<&'a [u8]>,
}

/// The attributes that transformers knows by name (`SPECIAL_TOKENS_ATTRIBUTES`).
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A model's special tokens by name, and the tokens that end a generation.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens {
    /// Texts by attribute name (`bos_token`, `eos_token`, ..., and a model's own `*_token` names): the
    /// variables that a chat template sees.
    pub by_name: BTreeMap<String, String>,
    /// Id of `bos_token`.
    pub bos_id: Option<u32>,
    /// Id of `eos_token`: what engines treat as the end of sequence.
    pub eos_id: Option<u32>,
    /// Id of `pad_token`.
    pub pad_id: Option<u32>,
    /// All tokens that end a generation by `generation_config.json`, or by `config.json` where that
    /// file is missing. `eos_id` may or may not be among them.
    pub generation_eos_ids: Vec<u32>,
}

/// What must be added to a `tokenizer.json` before it equals what transformers loads.
pub(crate) struct Additions {
    /// Names to tokens.
    pub(crate) named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    pub(crate) extra: Vec<AddedToken>,
    /// `added_tokens_decoder`, by id.
    pub(crate) added: BTreeMap<u32, AddedToken>,
    /// Special tokens in a text are to be tokenized as plain text.
    pub(crate) split_special_tokens: bool,
}

impl Additions {
    pub(crate) fn parse(files: &ModelFiles<'_>) -> Result<Self, LoadError> {
        let mut config = match files.tokenizer_config {
            Some(bytes) => object(bytes, "tokenizer_config.json")?,
            None => Map::new(),
        };
        let mut added = BTreeMap::new();
        if let Some(Value::Object(decoder)) = config.get("added_tokens_decoder") {
            for (id, token) in decoder {
                let id = id.parse().map_err(|_| LoadError::Field {
                    file: "tokenizer_config.json",
                    field: format!("added_tokens_decoder.{id}"),
                })?;
                if let Some(token) = added_token(token, false) {
                    added.insert(id, token);
                }
            }
        } else if let Some(bytes) = files.special_tokens_map {
            config.extend(object(bytes, "special_tokens_map.json")?);
        }

        let mut named = Vec::new();
        for name in NAMES {
            if let Some(token) = config.get(name).and_then(|value| added_token(value, true)) {
                named.push((name.to_owned(), token));
            }
        }
        for (name, value) in &config {
            if name.ends_with("_token") && !NAMES.contains(&name.as_str()) && value.is_string() {
                named.extend(added_token(value, true).map(|token| (name.clone(), token)));
            }
        }
        let mut extra = Vec::new();
        for key in ["extra_special_tokens", "additional_special_tokens"] {
            match config.get(key) {
                Some(Value::Array(tokens)) if extra.is_empty() => {
                    extra = tokens
                        .iter()
                        .filter_map(|token| added_token(token, true))
                        .collect();
                }
                Some(Value::Object(tokens)) => {
                    named.extend(tokens.iter().filter_map(|(name, token)| {
                        added_token(token, true).map(|token| (name.clone(), token))
                    }));
                }
                _ => {}
            }
        }
        let split_special_tokens = config
            .get("split_special_tokens")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        Ok(Self {
            named,
            extra,
            added,
            split_special_tokens,
        })
    }
}

/// Returns the ids that end a generation, from `generation_config.json` or else `config.json`.
pub(crate) fn generation_eos_ids(files: &ModelFiles<'_>) -> Result<Vec<u32>, LoadError> {
    let config = match (files.generation_config, files.config) {
        (Some(bytes), _) => object(bytes, "generation_config.json")?,
        (None, Some(bytes)) => object(bytes, "config.json")?,
        (None, None) => return Ok(Vec::new()),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    Ok(match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    })
}

/// Parses a file that must hold a JSON object.
pub(crate) fn object(bytes: &[u8], file: &'static str) -> Result<Map<String, Value>, LoadError> {
    serde_json::from_slice(bytes).map_err(|source| LoadError::Json {
        file,
        reason: source.to_string(),
    })
}

/// Reads a token written as a string or as an object; anything else (`null`) is no token.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    match value {
        Value::String(content) => Some(AddedToken::from(content.as_str(), special)),
        Value::Object(fields) => {
            let flag = |name: &str| fields.get(name).and_then(Value::as_bool);
            let special = special || flag("special").unwrap_or(false);
            let content = fields.get("content")?.as_str()?;
            Some(
                AddedToken::from(content, special)
                    .single_word(flag("single_word").unwrap_or(false))
                    .lstrip(flag("lstrip").unwrap_or(false))
                    .rstrip(flag("rstrip").unwrap_or(false))
                    .normalized(flag("normalized").unwrap_or(!special)),
            )
        }
        _ => None,
    }
}
