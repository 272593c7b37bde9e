//! The sampling defaults that a model's authors ship with it.

use serde::Deserialize;

/// What `generation_config.json` says, as far as vLLM applies it to requests (0.32,
/// `config/model.py`, `get_diff_sampling_param`). An absent field leaves the engine's default.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// Number of candidates.
    pub top_k: Option<i64>,
    /// Least probability of a candidate, relative to the best.
    pub min_p: Option<f64>,
    /// Multiplier against repetition; 1 is none.
    pub repetition_penalty: Option<f64>,
    /// Penalty for presence.
    pub presence_penalty: Option<f64>,
    /// Penalty for frequency.
    pub frequency_penalty: Option<f64>,
    /// Tokens to generate at most, where the request does not say.
    #[serde(rename = "max_new_tokens")]
    pub max_tokens: Option<u32>,
    /// Every token that ends generation, the tokenizer's own end-of-sequence token among them or not.
    #[serde(rename = "eos_token_id", deserialize_with = "one_or_many")]
    pub eos_token_ids: Vec<u32>,
}

impl GenerationConfig {
    /// Reads the model's files: `generation_config.json`, or in its absence `config.json`, as the
    /// transformers library does.
    ///
    /// # Errors
    /// When a file is not JSON or a field has another type.
    pub fn read(
        generation_config: Option<&[u8]>,
        config: Option<&[u8]>,
    ) -> Result<Self, serde_json::Error> {
        match generation_config.or(config) {
            Some(bytes) => serde_json::from_slice(bytes),
            None => Ok(Self::default()),
        }
    }
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        None,
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Ids::deserialize(deserializer)? {
        Ids::None => Vec::new(),
        Ids::One(id) => vec![id],
        Ids::Many(ids) => ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> GenerationConfig {
        GenerationConfig::read(Some(text.as_bytes()), None).unwrap()
    }

    #[test]
    fn the_end_token_may_be_absent_null_one_or_several() {
        assert!(read("{}").eos_token_ids.is_empty());
        assert!(read(r#"{"eos_token_id": null}"#).eos_token_ids.is_empty());
        assert_eq!(read(r#"{"eos_token_id": 7}"#).eos_token_ids, [7]);
        assert_eq!(read(r#"{"eos_token_id": [7, 9]}"#).eos_token_ids, [7, 9]);
    }

    #[test]
    fn unknown_fields_and_nulls_leave_the_defaults() {
        let config =
            read(r#"{"do_sample": true, "temperature": null, "top_k": 20, "max_new_tokens": 5}"#);
        assert_eq!(
            (config.temperature, config.top_k, config.max_tokens),
            (None, Some(20), Some(5))
        );
    }

    #[test]
    fn the_model_configuration_stands_in_for_a_missing_file() {
        let config = GenerationConfig::read(None, Some(br#"{"eos_token_id": 3}"#)).unwrap();
        assert_eq!(config.eos_token_ids, [3]);
        assert_eq!(
            GenerationConfig::read(None, None).unwrap(),
            GenerationConfig::default()
        );
    }
}
