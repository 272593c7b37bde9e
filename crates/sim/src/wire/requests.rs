//! Requests out of `EngineCoreRequest` arrays, with vLLM's own checks of them.
//!
//! What a real engine does not check is not checked here either: the point of a fragile engine is
//! that a frontend that sends nonsense is found out.

use super::WireVersion;
use super::msgpack::{DecodeError, Reader, Value};
use crate::request::{Request, Sampling, Transfer};

/// Fields that an ADD must have; later ones have defaults.
const REQUIRED_FIELDS: usize = 9;

/// An ADD as it was read.
#[derive(Debug)]
pub enum Add {
    Request(Box<Request>),
    /// The request cannot be answered, and the engine says so.
    Refused {
        id: String,
        client: usize,
    },
}

/// Why a message cannot be read. A real engine's input thread ends there, and nothing is heard
/// from it any more.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("request has {0} fields, {REQUIRED_FIELDS} are required")]
    TooShort(usize),
    #[error("field {0} is not of its type")]
    Type(&'static str),
    #[error("sampling parameter {0} is out of range")]
    Sampling(&'static str),
}

/// Reads an ADD.
///
/// # Errors
/// [`InputError`], for what ends a real engine's input thread.
pub fn decode_add(version: WireVersion, data: &[u8]) -> Result<Add, InputError> {
    let mut reader = Reader::new(data);
    let len = reader.array()?;
    if len < REQUIRED_FIELDS {
        return Err(InputError::TooShort(len));
    }
    let id = reader.value()?;
    let id = id
        .as_str()
        .ok_or(InputError::Type("request_id"))?
        .to_owned();
    let prompt = reader.tokens()?;
    let fields: Vec<Value> = (2..len).map(|_| reader.value()).collect::<Result<_, _>>()?;
    let field = |index: usize| fields.get(index - 2).filter(|value| !value.is_nil());
    let client = field(11).map_or(Some(0), Value::as_u64);
    let client = client.ok_or(InputError::Type("client_index"))? as usize;
    let params = field(3).ok_or(InputError::Type("sampling_params"))?;
    let Some(sampling) = decode_sampling(params)? else {
        return Ok(Add::Refused { id, client });
    };
    Ok(Add::Request(Box::new(Request {
        id: id.into(),
        client,
        prompt: prompt.unwrap_or_default(),
        sampling,
        cache_salt: field(7).and_then(Value::as_str).map(str::to_owned),
        lora: field(6)
            .map(|lora| decode_lora(version, lora))
            .transpose()?,
        priority: field(13).and_then(Value::as_i64).unwrap_or(0),
        transfer: decode_transfer(params),
        abort_immediately: field(19).and_then(Value::as_bool).unwrap_or(false),
    })))
}

/// Reads an ABORT: ids.
///
/// # Errors
/// [`InputError`].
pub fn decode_abort(data: &[u8]) -> Result<Vec<String>, InputError> {
    let value = super::msgpack::decode(data)?;
    let ids = value.as_array().ok_or(InputError::Type("abort"))?;
    let ids = ids.iter().map(|id| id.as_str().map(str::to_owned));
    ids.collect::<Option<_>>().ok_or(InputError::Type("abort"))
}

/// A UTILITY call.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub client: usize,
    pub id: Value,
    pub method: String,
    pub args: Vec<Value>,
}

/// Reads a UTILITY call.
///
/// # Errors
/// [`InputError`].
pub fn decode_utility(data: &[u8]) -> Result<Call, InputError> {
    let value = super::msgpack::decode(data)?;
    match value.as_array() {
        Some([client, id, method, args]) => Ok(Call {
            client: client.as_u64().ok_or(InputError::Type("client_index"))? as usize,
            id: id.clone(),
            method: method
                .as_str()
                .ok_or(InputError::Type("method"))?
                .to_owned(),
            args: args.as_array().ok_or(InputError::Type("args"))?.to_vec(),
        }),
        _ => Err(InputError::Type("utility call")),
    }
}

/// Adapter id and name of a `LoRARequest`; both are in front of the field that 0.32 removed.
///
/// # Errors
/// [`InputError`].
pub fn decode_lora(version: WireVersion, value: &Value) -> Result<(u64, String), InputError> {
    let fields = value.as_array().ok_or(InputError::Type("lora_request"))?;
    let most = if version == WireVersion::V0_27 { 7 } else { 6 };
    match fields {
        [name, id, ..] if fields.len() <= most => {
            let name = name.as_str().ok_or(InputError::Type("lora_name"))?;
            let id = id.as_u64().ok_or(InputError::Type("lora_int_id"))?;
            Ok((id, name.to_owned()))
        }
        _ => Err(InputError::Type("lora_request")),
    }
}

fn decode_transfer(params: &Value) -> Transfer {
    let Some(transfer) = params
        .get("extra_args")
        .and_then(|extra| extra.get("kv_transfer_params"))
    else {
        return Transfer::None;
    };
    let flag = |key| transfer.get(key).and_then(Value::as_bool).unwrap_or(false);
    if flag("do_remote_prefill") {
        Transfer::Fetch(transfer.clone())
    } else if flag("do_remote_decode") {
        Transfer::Produce
    } else {
        Transfer::None
    }
}

/// Reads sampling parameters; `None` for those that make an engine refuse the request alone.
fn decode_sampling(params: &Value) -> Result<Option<Sampling>, InputError> {
    if params.as_map().is_none() {
        return Err(InputError::Type("sampling_params"));
    }
    let float = |key: &'static str, default: f64| match params.get(key) {
        Some(value) => value.as_f64().ok_or(InputError::Type(key)),
        None => Ok(default),
    };
    let int = |key: &'static str| match params.get(key) {
        Some(value) => value.as_i64().map(Some).ok_or(InputError::Type(key)),
        None => Ok(None),
    };
    let tokens = |key: &'static str| match params.get(key) {
        Some(value) => token_list(value).ok_or(InputError::Type(key)),
        None => Ok(Vec::new()),
    };
    let check = |ok: bool, key: &'static str| {
        if ok {
            Ok(())
        } else {
            Err(InputError::Sampling(key))
        }
    };

    // The ranges of `SamplingParams._verify_args` (0.32).
    let temperature = float("temperature", 1.0)?;
    check((0.0..=2.0).contains(&temperature), "temperature")?;
    let top_p = float("top_p", 1.0)?;
    check(top_p > 0.0 && top_p <= 1.0, "top_p")?;
    check(int("top_k")?.unwrap_or(0) >= -1, "top_k")?;
    check((0.0..=1.0).contains(&float("min_p", 0.0)?), "min_p")?;
    for key in ["presence_penalty", "frequency_penalty"] {
        check((-2.0..=2.0).contains(&float(key, 0.0)?), key)?;
    }
    let repetition = float("repetition_penalty", 1.0)?;
    check(
        repetition.is_finite() && repetition > 0.0,
        "repetition_penalty",
    )?;
    let max_tokens = match params
        .as_map()
        .into_iter()
        .flatten()
        .find(|(key, _)| key.as_str() == Some("max_tokens"))
    {
        Some((_, Value::Nil)) => None,
        Some((_, value)) => Some(value.as_i64().ok_or(InputError::Type("max_tokens"))?),
        None => Some(16),
    };
    let min_tokens = int("min_tokens")?.unwrap_or(0);
    check(min_tokens >= 0, "min_tokens")?;
    if let Some(max_tokens) = max_tokens {
        check(max_tokens >= 1, "max_tokens")?;
        check(min_tokens <= max_tokens, "min_tokens")?;
    }
    for key in ["logprobs", "prompt_logprobs"] {
        check(int(key)?.unwrap_or(0) >= -1, key)?;
    }
    let structured = params.get("structured_outputs");
    if let Some(structured) = structured {
        let kinds = [
            "json",
            "regex",
            "choice",
            "grammar",
            "json_object",
            "structural_tag",
        ];
        let given = kinds.iter().filter(|kind| structured.get(kind).is_some());
        check(given.count() == 1, "structured_outputs")?;
    }
    let Some(max_tokens) = max_tokens else {
        return Ok(None);
    };
    if structured.is_some_and(|structured| structured.get("_backend").is_none()) {
        return Ok(None);
    }
    let prompt_logprobs = int("prompt_logprobs")?;
    let skip = params.get("skip_reading_prefix_cache");
    Ok(Some(Sampling {
        max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
        min_tokens: u32::try_from(min_tokens).unwrap_or(u32::MAX),
        seed: int("seed")?.map(|seed| seed as u64),
        greedy: temperature == 0.0,
        eos: params.get("_eos_token_id").and_then(Value::as_u32),
        stop_token_ids: tokens("stop_token_ids")?,
        logprobs: int("logprobs")?,
        prompt_logprobs,
        logit_bias: logit_bias(params)?,
        allowed: tokens("allowed_token_ids")?,
        bad_words: match params.get("_bad_words_token_ids").map(Value::as_array) {
            Some(words) => words
                .and_then(|words| words.iter().map(token_list).collect())
                .ok_or(InputError::Type("_bad_words_token_ids"))?,
            None => Vec::new(),
        },
        script: params
            .get("extra_args")
            .and_then(|extra| extra.get("sim_output"))
            .and_then(token_list),
        skip_reading_prefix_cache: match skip {
            Some(skip) => skip
                .as_bool()
                .ok_or(InputError::Type("skip_reading_prefix_cache"))?,
            None => prompt_logprobs.is_some(),
        },
    }))
}

fn token_list(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(Value::as_u32).collect()
}

fn logit_bias(params: &Value) -> Result<Vec<(u32, f64)>, InputError> {
    let Some(bias) = params.get("logit_bias") else {
        return Ok(Vec::new());
    };
    bias.as_map()
        .and_then(|bias| {
            bias.iter()
                .map(|(token, bias)| Some((token.as_u32()?, bias.as_f64()?)))
                .collect()
        })
        .ok_or(InputError::Type("logit_bias"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(sampling: Value) -> Result<Add, InputError> {
        let fields = vec![
            "r".into(),
            Value::from(vec![1u32, 2]),
            Value::Nil,
            sampling,
            Value::Nil,
            Value::Float(0.0),
            Value::Nil,
            Value::Nil,
            Value::Nil,
        ];
        decode_add(WireVersion::V0_33, &Value::Array(fields).to_vec())
    }

    #[test]
    fn what_pydantic_refuses_ends_the_input() {
        for (key, value) in [
            ("top_p", Value::Float(0.0)),
            ("temperature", Value::Float(3.0)),
            ("temperature", "warm".into()),
            ("max_tokens", Value::Int(0)),
            ("top_k", Value::Int(-2)),
            ("min_tokens", Value::Int(17)),
            ("stop_token_ids", Value::from(vec![Some("x".to_owned())])),
            ("structured_outputs", Value::Map(vec![])),
        ] {
            assert!(
                add(Value::map([(key, value.clone())])).is_err(),
                "{key} {value:?}"
            );
        }
    }

    #[test]
    fn what_the_engine_refuses_is_refused_alone() {
        let unbounded = Value::map([("max_tokens", Value::Nil)]);
        assert!(matches!(add(unbounded), Ok(Add::Refused { .. })));
        let no_backend = Value::map([(
            "structured_outputs",
            Value::map([("json_object", Value::Bool(true))]),
        )]);
        assert!(matches!(add(no_backend), Ok(Add::Refused { .. })));
    }

    #[test]
    fn unknown_parameters_and_further_fields_are_passed_over() {
        let sampling = Value::map([
            ("of_the_future", Value::Int(1)),
            ("max_tokens", Value::Int(3)),
        ]);
        let Ok(Add::Request(request)) = add(sampling) else {
            panic!("refused");
        };
        assert_eq!(request.sampling.max_tokens, 3);
        assert_eq!(request.prompt, [1, 2]);
    }

    #[test]
    fn too_few_fields_are_an_error() {
        let short = Value::Array(vec!["r".into()]).to_vec();
        assert!(matches!(
            decode_add(WireVersion::V0_33, &short),
            Err(InputError::TooShort(1))
        ));
    }
}
