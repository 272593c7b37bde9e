//! What vLLM's flags say, whichever spelling was given.

use serde_json::{Map, Value};

use super::{
    Arity, EngineFlag, is_flag,
    known::{Known, stem},
};

/// vLLM's flags as [`split`](super::split) returns them, by their long names, whichever spelling was given.
///
/// What vLLM 0.33 does not know is there too, as it was given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given<'a>(Vec<GivenFlag<'a>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct GivenFlag<'a> {
    /// Without its dashes; with the keys of a dotted name.
    name: String,
    value: Option<&'a str>,
    /// What follows the value, where the flag takes several.
    more: &'a [String],
    /// `--no-x`.
    negated: bool,
}

impl<'a> Given<'a> {
    /// Reads vLLM's arguments.
    pub fn read(args: &'a [String]) -> Self {
        let known = EngineFlag::built_in();
        let known = Known::new(&clap::Command::new(""), &known);
        let mut given = Vec::new();
        for (at, argument) in args.iter().enumerate() {
            // A value that looks like no flag belongs to the flag before it.
            if !is_flag(argument) {
                continue;
            }
            let (name, joined) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (argument.as_str(), None),
            };
            let after = &args[at + 1..];
            let free = after.iter().take_while(|next| !is_flag(next)).count();
            let mut values = after[..free].iter();
            let value = joined.or_else(|| values.next().map(String::as_str));
            let more = values.as_slice();
            let (stem, key) = stem(name);
            let flag = match known.engine_flag(name, &stem, key.is_some()) {
                Ok((flag, _, true)) => GivenFlag {
                    name: flag.long().to_owned(),
                    value: argument.get(2..),
                    more: &[],
                    negated: false,
                },
                Ok((flag, arity, false)) => GivenFlag {
                    name: [Some(flag.long()), key]
                        .iter()
                        .flatten()
                        .copied()
                        .collect::<Vec<_>>()
                        .join("."),
                    value: value.filter(|_| arity != Arity::Flag),
                    more: if arity == Arity::Many && joined.is_none() {
                        more
                    } else {
                        &[]
                    },
                    negated: arity == Arity::Flag
                        && !flag.names.iter().any(|name| name.starts_with(&stem)),
                },
                Err(_) => GivenFlag {
                    name: name.trim_start_matches('-').replace('_', "-"),
                    value,
                    more: &[],
                    negated: false,
                },
            };
            given.push(flag);
        }
        Self(given)
    }

    /// Says whether a flag, or a key of it, is given and not negated after that.
    pub fn has(&self, name: &str) -> bool {
        let mut mentions = self.0.iter().rev();
        mentions
            .find(|flag| flag.name.split('.').next() == Some(name))
            .is_some_and(|flag| !flag.negated)
    }

    /// Returns the last value of a flag, which is the one that counts.
    pub fn value(&self, name: &str) -> Option<&'a str> {
        let mut mentions = self.0.iter().rev().filter(|flag| flag.name == name);
        mentions.find_map(|flag| flag.value)
    }

    /// Returns the values of a flag that takes several, as it is given last; empty if it is not given.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &'a str> {
        let last = self.0.iter().rev().find(|flag| flag.name == name);
        last.into_iter().flat_map(|flag| {
            let more = flag.more.iter().map(String::as_str);
            flag.value.into_iter().chain(more)
        })
    }

    /// Returns the value of a flag that takes a JSON object, written as JSON or key by key (`--x.key.key v`).
    ///
    /// As in vLLM, keys replace the JSON and are not merged into it (utils/argparse_utils.py,
    /// `parse_args`).
    ///
    /// # Errors
    /// The last value is not a JSON object.
    pub fn object(&self, name: &str) -> Result<Option<Map<String, Value>>, serde_json::Error> {
        let mut by_key = Map::new();
        for flag in &self.0 {
            let Some((stem, keys)) = flag.name.split_once('.') else {
                continue;
            };
            if let Some(value) = flag.value.filter(|_| stem == name) {
                put(&mut by_key, keys, value);
            }
        }
        if !by_key.is_empty() {
            return Ok(Some(by_key));
        }
        self.value(name).map(serde_json::from_str).transpose()
    }
}

/// Returns vLLM's arguments without a flag, in every spelling, and without its keys.
pub fn without(args: &[String], name: &str) -> Vec<String> {
    let known = EngineFlag::built_in();
    let known = Known::new(&clap::Command::new(""), &known);
    let mut kept = Vec::new();
    let mut rest = args;
    while let Some((argument, after)) = rest.split_first() {
        rest = after;
        let (stem, key) = stem(argument.split('=').next().unwrap_or_default());
        let found = is_flag(argument)
            .then(|| known.engine_flag(argument, &stem, key.is_some()).ok())
            .flatten();
        match found {
            Some((flag, arity, joined)) if flag.long() == name => {
                let in_one = joined || argument.contains('=') || arity == Arity::Flag;
                let values = rest.iter().take_while(|next| !is_flag(next)).count();
                rest = &rest[if in_one { 0 } else { values.min(1) }..];
            }
            _ => kept.push(argument.clone()),
        }
    }
    kept
}

/// Puts a value under its keys; `key+` appends to a list.
fn put(object: &mut Map<String, Value>, keys: &str, text: &str) {
    if let Some((key, rest)) = keys.split_once('.') {
        let inner = object
            .entry(key)
            .or_insert_with(|| Value::Object(Map::new()));
        if !inner.is_object() {
            *inner = Value::Object(Map::new());
        }
        if let Value::Object(inner) = inner {
            put(inner, rest, text);
        }
        return;
    }
    let Some(key) = keys.strip_suffix('+') else {
        let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
        object.insert(keys.to_owned(), value);
        return;
    };
    let more = text.split(',').map(Value::from);
    match object.get_mut(key) {
        Some(Value::Array(list)) => list.extend(more),
        _ => drop(object.insert(key.to_owned(), more.collect())),
    }
}
