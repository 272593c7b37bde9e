//! What vLLM's flags say, whichever spelling was given.

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
            let next = args.get(at + 1).filter(|next| !is_flag(next));
            let value = joined.or_else(|| next.map(String::as_str));
            let (stem, key) = stem(name);
            let flag = match known.engine_flag(name, &stem, key.is_some()) {
                Ok((flag, _, true)) => GivenFlag {
                    name: flag.long().to_owned(),
                    value: argument.get(2..),
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
                    negated: arity == Arity::Flag
                        && !flag.names.iter().any(|name| name.starts_with(&stem)),
                },
                Err(_) => GivenFlag {
                    name: name.trim_start_matches('-').replace('_', "-"),
                    value,
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
}
