//! Which flag a spelling means, ours or vLLM's.

use std::collections::HashMap;

use super::{Arity, EngineFlag, FlagError, RESERVED};

/// Takes the keys off a dotted name. Underscores count as dashes, but not in the keys.
pub(super) fn stem(name: &str) -> (String, Option<&str>) {
    let (stem, key) = match name.split_once('.') {
        Some((stem, key)) => (stem, Some(key)),
        None => (name, None),
    };
    let stem = match stem.strip_prefix("--") {
        Some(stem) => format!("--{}", stem.replace('_', "-")),
        None => stem.to_owned(),
    };
    (stem, key)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Own,
    Model,
    Engine,
}

/// A flag as it was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) owner: Owner,
    pub(super) arity: Arity,
    /// The value is part of the argument without `=` (`-O3`).
    pub(super) joined: bool,
}

/// Every spelling of every flag, ours and vLLM's.
pub(super) struct Known<'a> {
    own: HashMap<String, Arity>,
    engine: HashMap<String, (&'a EngineFlag, Arity)>,
}

impl<'a> Known<'a> {
    pub(super) fn new(own: &clap::Command, engine: &'a [EngineFlag]) -> Self {
        let mut ours = HashMap::new();
        for name in ["--help", "-h", "--version", "-V"] {
            ours.insert(name.to_owned(), Arity::Flag);
        }
        for argument in own
            .get_arguments()
            .filter(|argument| !argument.is_positional())
        {
            let arity = own_arity(argument);
            let longs = argument.get_long_and_visible_aliases().unwrap_or_default();
            let hidden = argument.get_all_aliases().unwrap_or_default();
            for long in longs.into_iter().chain(hidden) {
                ours.insert(format!("--{long}"), arity);
            }
            for short in argument.get_short_and_visible_aliases().unwrap_or_default() {
                ours.insert(format!("-{short}"), arity);
            }
        }
        let mut theirs = HashMap::new();
        for flag in engine {
            for name in &flag.names {
                theirs.insert(name.clone(), (flag, flag.arity));
                if flag.arity == Arity::Flag && name.starts_with("--") {
                    theirs.insert(format!("--no-{}", &name[2..]), (flag, Arity::Flag));
                }
            }
        }
        Self {
            own: ours,
            engine: theirs,
        }
    }

    /// Finds a flag by what stands before its `=`.
    pub(super) fn find(&self, name: &str) -> Result<Found, FlagError> {
        if let Some(arity) = self.own.get(name) {
            return Ok(Found {
                owner: Owner::Own,
                arity: *arity,
                joined: false,
            });
        }
        let (stem, key) = stem(name);
        if stem == "--model" && key.is_none() {
            return Ok(Found {
                owner: Owner::Model,
                arity: Arity::One,
                joined: false,
            });
        }
        let (flag, arity, joined) = self.engine_flag(name, &stem, key.is_some())?;
        if RESERVED.iter().any(|reserved| flag.names[0] == *reserved) {
            return Err(FlagError::Reserved {
                flag: name.to_owned(),
            });
        }
        Ok(Found {
            owner: Owner::Engine,
            arity,
            joined,
        })
    }

    /// Finds a flag of vLLM's, with its arity, and whether its value is attached to it.
    pub(super) fn engine_flag(
        &self,
        name: &str,
        stem: &str,
        key: bool,
    ) -> Result<(&'a EngineFlag, Arity, bool), FlagError> {
        match self.engine.get(stem) {
            Some((flag, _)) if key => Ok((*flag, Arity::One, false)),
            Some((flag, arity)) => Ok((*flag, *arity, false)),
            None => self.inexact(name, stem),
        }
    }

    /// A unique prefix of a long flag, or a short flag with its value attached.
    fn inexact(&self, name: &str, stem: &str) -> Result<(&'a EngineFlag, Arity, bool), FlagError> {
        if !stem.starts_with("--") {
            // -O is an alias that vLLM's parser handles by itself: -O3, -O 3, -Odecode.
            let level = self
                .engine
                .get("--optimization-level")
                .filter(|_| stem.starts_with("-O"));
            let short = stem.get(..2).and_then(|short| self.engine.get(short));
            return match (level, short) {
                (Some((flag, arity)), _) => Ok((*flag, *arity, stem.len() > 2)),
                (None, Some((flag, arity))) => Ok((*flag, *arity, true)),
                (None, None) => Err(self.unknown(name)),
            };
        }
        let mut meanings: Vec<_> = self
            .engine
            .iter()
            .filter(|(known, _)| known.starts_with(stem))
            .collect();
        meanings.sort_by_key(|(known, _)| known.as_str());
        match meanings[..] {
            [] => Err(self.unknown(name)),
            [(_, (flag, arity))] => Ok((*flag, *arity, false)),
            _ => Err(FlagError::Ambiguous {
                flag: name.to_owned(),
                meanings: meanings
                    .iter()
                    .map(|(known, _)| format!("`{known}`"))
                    .collect(),
            }),
        }
    }

    fn unknown(&self, name: &str) -> FlagError {
        let distance = |known: &&String| strsim::damerau_levenshtein(known, name);
        let nearest = self
            .own
            .keys()
            .chain(self.engine.keys())
            .min_by_key(|known| (distance(known), (*known).clone()));
        // Further than a third of its letters away, a name is no typing error.
        let nearest = nearest.filter(|known| distance(known) <= name.len() / 3);
        FlagError::Unknown {
            flag: name.to_owned(),
            nearest: nearest.cloned(),
        }
    }
}

fn own_arity(argument: &clap::Arg) -> Arity {
    if !argument.get_action().takes_values() {
        return Arity::Flag;
    }
    match argument.get_num_args() {
        Some(range) if range.min_values() == 0 => Arity::Optional,
        Some(range) if range.max_values() > 1 => Arity::Many,
        _ => Arity::One,
    }
}
