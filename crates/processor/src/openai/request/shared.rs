//! The fields that chat completions and completions have in common.
//!
//! Names and defaults are vLLM's (0.32, `openai/chat_completion/protocol.py`, `openai/completion/protocol.py`).
//! Fields of OpenAI that change nothing here (`metadata`, `store`, `service_tier`, ...) are not
//! listed: unknown fields are skipped.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer};

use super::fields::fields;
use super::scalar::{Int, LogitBias, OneOrMany, Present, Text};

fields! {
    /// What every generating request may say.
    Shared {
        model: String,
        request_id: String,
        stream: bool,
        stream_options: StreamOptions,
        n: Int,
        best_of: Int,
        echo: bool,

        temperature: f64,
        top_p: f64,
        top_k: Int,
        min_p: f64,
        seed: Int,
        presence_penalty: f64,
        frequency_penalty: f64,
        repetition_penalty: f64,
        logit_bias: LogitBias,
        allowed_token_ids: Vec<Int>,
        bad_words: Vec<String>,

        max_tokens: Int,
        min_tokens: Int,
        stop: OneOrMany,
        stop_token_ids: Vec<Int>,
        ignore_eos: bool,
        include_stop_str_in_output: bool,
        thinking_token_budget: Int,

        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        add_special_tokens: bool,
        truncate_prompt_tokens: Int,
        truncation_side: Side,

        prompt_logprobs: Int,
        return_tokens_as_token_ids: bool,
        return_token_ids: bool,

        response_format: ResponseFormat,
        structured_outputs: StructuredOutputs,
        /// vLLM's older spellings of `structured_outputs`.
        guided_json: Text,
        guided_regex: String,
        guided_choice: Vec<String>,
        guided_grammar: String,

        priority: Int,
        cache_salt: String,
        /// May make requests a session (`--session-affinity user`).
        user: String,
        vllm_xargs: Box<serde_json::value::RawValue>,

        // What follows is refused when it would change the answer.
        use_beam_search: bool,
        logprob_token_ids: Vec<Int>,
        prompt_embeds: Present,
        repetition_detection: Present,
        kv_transfer_params: Present,
        ec_transfer_params: Present,
        mm_processor_kwargs: Present,
        media_io_kwargs: Present,
    }
}

/// What a stream carries besides the answer.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    /// One more event at the end, with the usage.
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
    /// The usage so far in every event; needs `include_usage`.
    #[serde(default)]
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// The end from which a prompt is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// Keeps the last tokens.
    Left,
    /// Keeps the first tokens.
    Right,
}

/// What the answer must look like, in OpenAI's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ResponseFormat {
    /// Anything.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema, given as JSON text.
    JsonSchema(String),
    /// Text with constrained parts: the whole `response_format`, as JSON text.
    StructuralTag(String),
}

impl<'de> Deserialize<'de> for ResponseFormat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Format<'a> {
            r#type: &'a str,
            #[serde(borrow)]
            json_schema: Option<Named<'a>>,
        }
        #[derive(Deserialize)]
        struct Named<'a> {
            #[serde(borrow)]
            schema: Option<&'a serde_json::value::RawValue>,
        }
        let raw = <Box<serde_json::value::RawValue>>::deserialize(deserializer)?;
        let format: Format<'_> = serde_json::from_str(raw.get()).map_err(without_position)?;
        match format.r#type {
            "text" => Ok(Self::Text),
            "json_object" => Ok(Self::JsonObject),
            "json_schema" => {
                let schema = format
                    .json_schema
                    .and_then(|named| named.schema)
                    .ok_or_else(|| {
                        de::Error::custom("type 'json_schema' needs the field 'json_schema.schema'")
                    })?;
                Ok(Self::JsonSchema(schema.get().to_owned()))
            }
            "structural_tag" => Ok(Self::StructuralTag(Box::<str>::from(raw).into())),
            other => Err(de::Error::custom(format_args!(
                "unknown type '{other}', expected text, json_object, json_schema or structural_tag"
            ))),
        }
    }
}

/// Drops the position, which would be the one within the field.
fn without_position<E: de::Error>(error: impl fmt::Display) -> E {
    let message = error.to_string();
    E::custom(
        message
            .rsplit_once(" at line ")
            .map_or(&*message, |(head, _)| head),
    )
}

/// What the answer must look like, in vLLM's terms. Exactly one constraint is set.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct StructuredOutputs {
    pub(crate) json: Option<Text>,
    pub(crate) regex: Option<String>,
    pub(crate) choice: Option<Vec<String>>,
    pub(crate) grammar: Option<String>,
    pub(crate) json_object: Option<bool>,
    pub(crate) structural_tag: Option<Text>,
    pub(crate) disable_any_whitespace: Option<bool>,
    pub(crate) disable_additional_properties: Option<bool>,
    pub(crate) whitespace_pattern: Option<String>,
}
