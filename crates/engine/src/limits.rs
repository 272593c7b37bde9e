//! What an engine can take, from what it said when it was ready and what it was started with.

use serde_json::Value;

use crate::{
    info::EngineInfo,
    validate::{Backend, Limits},
};

/// Returns the limits of an engine.
///
/// - `args`: the vLLM flags that it was started with; the ready response does not repeat these.
pub(crate) fn limits(info: &EngineInfo, args: &[String]) -> Limits {
    let args = Args(args);
    let defaults = Limits::new(info.vocab_size, info.max_model_len);
    let max_logprobs = args
        .value("max-logprobs")
        .and_then(|value| value.parse().ok());
    Limits {
        max_logprobs: max_logprobs.unwrap_or(defaults.max_logprobs),
        lora: info.supports_lora,
        reasoning: args.has("reasoning-parser") || args.has("reasoning-config"),
        speculative: args.has("speculative-config"),
        structured_outputs: if args.has("skip-tokenizer-init") {
            None
        } else {
            args.backend()
        },
        ..defaults
    }
}

/// vLLM flags: `--name value`, `--name=value`, `--name.key value`, `--name_with_underscores`.
struct Args<'a>(&'a [String]);

impl<'a> Args<'a> {
    /// Returns name (with dashes) and value of each flag; a flag's value may be the next argument.
    fn flags(&self) -> impl Iterator<Item = (String, Option<&'a str>)> {
        let args = self.0;
        args.iter().enumerate().filter_map(move |(at, arg)| {
            let flag = arg.strip_prefix("--")?;
            let next = args
                .get(at + 1)
                .map(String::as_str)
                .filter(|next| !next.starts_with("--"));
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, next),
            };
            Some((name.replace('_', "-"), value))
        })
    }

    fn has(&self, name: &str) -> bool {
        self.flags()
            .any(|(flag, _)| flag.split('.').next() == Some(name))
    }

    /// Returns the last value of a flag, which is the one that counts.
    fn value(&self, name: &str) -> Option<&'a str> {
        self.flags()
            .filter(|(flag, _)| flag == name)
            .filter_map(|(_, value)| value)
            .last()
    }

    /// Returns the grammar backend that requests must name.
    fn backend(&self) -> Option<Backend> {
        let config = self.value("structured-outputs-config");
        let config: Option<Value> = config.and_then(|json| serde_json::from_str(json).ok());
        let name = self
            .value("structured-outputs-config.backend")
            .or_else(|| self.value("guided-decoding-backend"))
            .or_else(|| config.as_ref()?.get("backend")?.as_str());
        Some(name.and_then(Backend::from_config).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_found_in_every_spelling_and_the_last_one_counts() {
        let args: Vec<String> = [
            "--max_logprobs",
            "5",
            "--max-logprobs=40",
            "--enable-lora",
            "--reasoning-config.x",
            "1",
            "--structured-outputs-config",
            r#"{"backend": "guidance"}"#,
        ]
        .map(str::to_owned)
        .into();
        let args = Args(&args);
        assert_eq!(args.value("max-logprobs"), Some("40"));
        assert!(args.has("enable-lora") && args.has("reasoning-config"));
        assert!(!args.has("speculative-config"));
        assert_eq!(args.backend(), Some(Backend::Guidance));
        assert_eq!(args.value("enable-lora"), None);
    }
}
