//! Splits a command line into our flags and vLLM's, which pass through untouched.
//!
//! vLLM takes more than 300 flags and reads them after many seconds of imports, so a typing error
//! would cost half a minute and end in a child's log. What vLLM knows comes from its sources
//! ([`crate::introspect`]), and an unknown flag fails here at once. Spellings are those of vLLM's
//! `FlexibleArgumentParser` (`utils/argparse_utils.py`): `--x v`, `--x=v`, underscores, unique
//! prefixes, `--no-x`, `--x.key.key v` for JSON, `-O3`, and several values after one flag.
//!
//! What follows `--` goes to vLLM unchecked: flags that plug-ins add are not in its sources.

use std::{collections::HashMap, ffi::OsString, path::Path};

use serde::Deserialize;

/// Flags of vLLM 0.33, for engines that run elsewhere.
const BUILT_IN: &str = include_str!("flags/v0_33.json");

/// Flags by which the engine is tied to its worker; set by us and by nobody else.
const RESERVED: [&str; 8] = [
    "--headless",
    "--api-server-count",
    "--data-parallel-address",
    "--data-parallel-rpc-port",
    "--data-parallel-size-local",
    "--data-parallel-start-rank",
    "--data-parallel-hybrid-lb",
    "--data-parallel-external-lb",
];

/// A flag of `vllm serve`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct EngineFlag {
    /// All spellings, the long one first.
    pub names: Vec<String>,
    pub arity: Arity,
}

impl EngineFlag {
    /// Returns the long name without its dashes.
    fn long(&self) -> &str {
        self.names[0].trim_start_matches('-')
    }

    /// Returns the flags of the newest supported release, for when no vLLM is installed here.
    pub fn built_in() -> Vec<Self> {
        serde_json::from_str(BUILT_IN).expect("the built-in list is checked by a test")
    }
}

/// What follows a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arity {
    /// Nothing; `--no-x` negates it.
    Flag,
    /// At most one value.
    Optional,
    One,
    /// One value or more.
    Many,
}

/// A command line, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// The program's name and our own flags, for clap.
    pub own: Vec<OsString>,
    /// The positional argument, or what followed `--model`.
    pub model: Option<String>,
    /// vLLM's flags as they were given.
    pub engine: Vec<String>,
}

/// Why a command line cannot be split.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    #[error("unknown flag `{flag}`{}", did_you_mean(.nearest))]
    Unknown {
        flag: String,
        nearest: Option<String>,
    },
    #[error("`{flag}` may mean {}", .meanings.join(" or "))]
    Ambiguous { flag: String, meanings: Vec<String> },
    #[error("`{flag}` needs a value")]
    NoValue { flag: String },
    #[error("`{flag}` is set by the worker")]
    Reserved { flag: String },
    #[error("unexpected argument `{argument}`: the model is `{model}` already")]
    TwoModels { argument: String, model: String },
    #[error("`{argument}` is not valid UTF-8")]
    Utf8 { argument: String },
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map_or_else(String::new, |name| format!(", did you mean `{name}`?"))
}

/// Splits a command line.
///
/// - `argv`: with the program's name.
/// - `own`: our flags. Where one is vLLM's too, it is ours.
/// - `engine`: vLLM's flags.
///
/// # Errors
/// [`FlagError`] names the first argument at fault.
pub fn split(
    argv: impl IntoIterator<Item = OsString>,
    own: &clap::Command,
    engine: &[EngineFlag],
) -> Result<Split, FlagError> {
    let known = Known::new(own, engine);
    let mut argv = argv.into_iter();
    let mut split = Split {
        own: argv.next().into_iter().collect(),
        ..Split::default()
    };
    let arguments = argv.map(|argument| {
        argument.into_string().map_err(|argument| FlagError::Utf8 {
            argument: argument.to_string_lossy().into_owned(),
        })
    });
    let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
    let mut rest = &arguments[..];
    while let Some((argument, after)) = rest.split_first() {
        rest = after;
        if argument == "--" {
            split.engine.extend_from_slice(rest);
            break;
        }
        if !is_flag(argument) {
            split.set_model(argument)?;
            continue;
        }
        let name = argument.split('=').next().unwrap_or_default();
        let flag = known.find(name)?;
        let taken = if argument.contains('=') || flag.joined {
            0
        } else {
            values(argument, flag.arity, rest)?
        };
        let (values, after) = rest.split_at(taken);
        rest = after;
        match flag.owner {
            Owner::Own => {
                split.own.push(argument.into());
                split.own.extend(values.iter().map(OsString::from));
            }
            Owner::Model => match argument.split_once('=') {
                Some((_, model)) => split.set_model(model)?,
                None => split.set_model(&values[0])?,
            },
            Owner::Engine => {
                split.engine.push(argument.clone());
                split.engine.extend_from_slice(values);
            }
        }
    }
    Ok(split)
}

impl Split {
    fn set_model(&mut self, model: &str) -> Result<(), FlagError> {
        match self.model.replace(model.to_owned()) {
            None => Ok(()),
            Some(first) => Err(FlagError::TwoModels {
                argument: model.to_owned(),
                model: first,
            }),
        }
    }
}

/// Returns the value of one of our flags before anything is split: which Python to ask for
/// vLLM's flags is itself a flag.
pub fn own_value(argv: &[OsString], long: &str) -> Option<OsString> {
    let mut arguments = argv.iter().skip(1).take_while(|argument| *argument != "--");
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        match text
            .strip_prefix("--")
            .and_then(|text| text.strip_prefix(long))
        {
            Some("") => return arguments.next().cloned(),
            Some(value) => {
                if let Some(value) = value.strip_prefix('=') {
                    return Some(value.into());
                }
            }
            None => {}
        }
    }
    None
}

/// Returns the command that prints vLLM's own engine options (in about 15 s, vLLM is imported).
pub fn help_command(python: &Path) -> String {
    format!(
        "{} -m vllm.entrypoints.cli.main serve --help=all",
        python.display()
    )
}

/// As argparse sees it: a dash, but no number and no text with blanks. The value behind a `=` may have
/// them.
fn is_flag(argument: &str) -> bool {
    let name = argument.split('=').next().unwrap_or_default();
    let number = || argument[1..].parse::<f64>().is_ok();
    argument.len() > 1 && argument.starts_with('-') && !name.contains(' ') && !number()
}

/// How many of the following arguments are values of a flag.
fn values(flag: &str, arity: Arity, rest: &[String]) -> Result<usize, FlagError> {
    let free = rest
        .iter()
        .take_while(|argument| *argument != "--" && !is_flag(argument))
        .count();
    match arity {
        Arity::Flag => Ok(0),
        Arity::Optional => Ok(free.min(1)),
        Arity::One | Arity::Many if free == 0 => Err(FlagError::NoValue {
            flag: flag.to_owned(),
        }),
        Arity::One => Ok(1),
        Arity::Many => Ok(free),
    }
}

/// Takes the keys off a dotted name. Underscores count as dashes, but not in the keys.
fn stem(name: &str) -> (String, Option<&str>) {
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
enum Owner {
    Own,
    Model,
    Engine,
}

/// A flag as it was found.
#[derive(Debug, Clone, Copy)]
struct Found {
    owner: Owner,
    arity: Arity,
    /// The value is part of the argument without `=` (`-O3`).
    joined: bool,
}

/// Every spelling of every flag, ours and vLLM's.
struct Known<'a> {
    own: HashMap<String, Arity>,
    engine: HashMap<String, (&'a EngineFlag, Arity)>,
}

impl<'a> Known<'a> {
    fn new(own: &clap::Command, engine: &'a [EngineFlag]) -> Self {
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
    fn find(&self, name: &str) -> Result<Found, FlagError> {
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
    fn engine_flag(
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

/// vLLM's flags as [`split`] returns them, by their long names, whichever spelling was given.
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

#[cfg(test)]
mod tests;
