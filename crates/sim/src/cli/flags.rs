//! Flags as vLLM writes them, known or not.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use super::CliError;

/// Flags in the order given; underscores are read as dashes, as vLLM does.
pub(super) struct Flags(pub(super) Vec<(String, Option<String>)>);

impl Flags {
    /// Takes a command line apart: words, and flags with their values.
    pub(super) fn parse(
        args: impl Iterator<Item = String>,
    ) -> Result<(Vec<String>, Self), CliError> {
        let (mut words, mut flags) = (Vec::new(), Vec::new());
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix("--") else {
                words.push(arg);
                continue;
            };
            let (name, mut value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let name = format!("--{}", name.replace('_', "-"));
            if value.is_none() && !is_switch(&name) {
                value = args.next_if(|next| !next.starts_with("--"));
            }
            flags.push((name, value));
        }
        Ok((words, Self(flags)))
    }

    /// The last value of a flag.
    pub(super) fn text(&mut self, flag: &str) -> Result<Option<String>, CliError> {
        let mut found = None;
        self.0.retain_mut(|(name, value)| {
            let mine = name == flag;
            if mine {
                found = Some(value.take());
            }
            !mine
        });
        match found {
            Some(None) => Err(CliError::NoValue(flag.into())),
            Some(value) => Ok(value),
            None => Ok(None),
        }
    }

    /// The last value of a flag, parsed.
    pub(super) fn get<T: FromStr<Err: Display>>(
        &mut self,
        flag: &str,
    ) -> Result<Option<T>, CliError> {
        let Some(value) = self.text(flag)? else {
            return Ok(None);
        };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(reason) => Err(CliError::Value {
                flag: flag.into(),
                value,
                reason: reason.to_string(),
            }),
        }
    }

    /// A count, also as vLLM writes large ones: `8k` is 8000, `8K` 8192.
    pub(super) fn count(&mut self, flag: &str) -> Result<Option<usize>, CliError> {
        let Some(value) = self.text(flag)? else {
            return Ok(None);
        };
        let (digits, unit) = match value.char_indices().last() {
            Some((at, 'k')) => (&value[..at], 1000.0),
            Some((at, 'K')) => (&value[..at], 1024.0),
            Some((at, 'm')) => (&value[..at], 1e6),
            Some((at, 'M')) => (&value[..at], 1_048_576.0),
            _ => (&value[..], 1.0),
        };
        match digits.parse::<f64>() {
            Ok(count) if count >= 0.0 => Ok(Some((count * unit) as usize)),
            _ => Err(CliError::Value {
                flag: flag.into(),
                value: value.clone(),
                reason: "not a count".into(),
            }),
        }
    }

    /// Whether a flag without a value was given.
    pub(super) fn switch(&mut self, flag: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|(name, _)| name != flag);
        self.0.len() != before
    }

    /// A time in microseconds.
    pub(super) fn micros(&mut self, flag: &str, default: Duration) -> Result<Duration, CliError> {
        let micros: Option<f64> = self.get(flag)?;
        Ok(micros.map_or(default, |micros| {
            Duration::from_secs_f64(micros.max(0.0) / 1e6)
        }))
    }

    /// A time in milliseconds.
    pub(super) fn millis(&mut self, flag: &str, default: Duration) -> Result<Duration, CliError> {
        let millis: Option<u64> = self.get(flag)?;
        Ok(millis.map_or(default, Duration::from_millis))
    }

    /// A JSON value.
    pub(super) fn json(&mut self, flag: &str) -> Result<Option<Value>, CliError> {
        self.get(flag)
    }
}

fn is_switch(flag: &str) -> bool {
    matches!(
        flag,
        "--headless"
            | "--enforce-eager"
            | "--enable-lora"
            | "--enable-sleep-mode"
            | "--disable-log-stats"
            | "--enable-prefix-caching"
            | "--no-enable-prefix-caching"
            | "--enable-chunked-prefill"
            | "--no-enable-chunked-prefill"
            | "--trust-remote-code"
            | "--sim-fail-to-load"
            | "--help"
    )
}
