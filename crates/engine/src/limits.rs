//! What an engine can take, from what it said when it was ready and what it was started with.

use serde_json::Value;

use crate::{
    flags::Given,
    info::EngineInfo,
    validate::{Backend, Limits},
};

/// Flags that turn speculative decoding on, each by itself.
const SPECULATIVE: [&str; 4] = [
    "speculative-config",
    "spec-method",
    "spec-model",
    "spec-tokens",
];

/// Returns the limits of an engine.
///
/// - `args`: the vLLM flags that it was started with; the ready response does not repeat these.
pub(crate) fn limits(info: &EngineInfo, args: &[String]) -> Limits {
    let args = Given::read(args);
    let defaults = Limits::new(info.vocab_size, info.max_model_len);
    let max_logprobs = args
        .value("max-logprobs")
        .and_then(|value| value.parse().ok());
    Limits {
        max_logprobs: max_logprobs.unwrap_or(defaults.max_logprobs),
        lora: info.supports_lora,
        reasoning: args.has("reasoning-parser") || args.has("reasoning-config"),
        speculative: SPECULATIVE.iter().any(|name| args.has(name)),
        structured_outputs: if args.has("skip-tokenizer-init") {
            None
        } else {
            Some(backend(&args))
        },
        ..defaults
    }
}

/// Returns the grammar backend that requests must name.
fn backend(args: &Given<'_>) -> Backend {
    let config = args.value("structured-outputs-config");
    let config: Option<Value> = config.and_then(|json| serde_json::from_str(json).ok());
    let name = args
        .value("structured-outputs-config.backend")
        .or_else(|| args.value("guided-decoding-backend"))
        .or_else(|| config.as_ref()?.get("backend")?.as_str());
    name.and_then(Backend::from_config).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backend_is_found_in_every_spelling() {
        for args in [
            ["--structured-outputs-config", r#"{"backend": "guidance"}"#],
            ["--structured_outputs_config.backend", "guidance"],
        ] {
            let args = args.map(str::to_owned);
            assert_eq!(backend(&Given::read(&args)), Backend::Guidance);
        }
    }
}
