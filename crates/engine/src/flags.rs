//! Splits a command line into our flags and vLLM's, which pass through untouched.
//!
//! vLLM takes more than 300 flags and reads them after many seconds of imports, so a typing error
//! would cost half a minute and end in a child's log. What vLLM knows comes from its sources
//! ([`crate::introspect`]), and an unknown flag fails here at once. Spellings are those of vLLM's
//! `FlexibleArgumentParser` (`utils/argparse_utils.py`): `--x v`, `--x=v`, underscores, unique
//! prefixes, `--no-x`, `--x.key.key v` for JSON, `-O3`, and several values after one flag.
//!
//! What follows `--` goes to vLLM unchecked: flags that plug-ins add are not in its sources.

mod given;
mod known;

use std::{ffi::OsString, path::Path};

use serde::Deserialize;

use known::{Known, Owner};

pub use given::{Given, without};

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

#[cfg(test)]
mod tests;
