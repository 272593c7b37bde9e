//! `stator worker`: one entry for every way in which Dynamo's worker is told its role.
//!
//! A command line that was written for `python -m dynamo.vllm` works with these words replaced: the role is taken out of
//! it, and the program of that role becomes this process with everything else. Nothing stays between the two.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use stator_common::{
    card::Role,
    settings::{DISAGGREGATION_MODE, IS_DECODE_WORKER, IS_PREFILL_WORKER, of_the_role},
};

use crate::checks;
use crate::cli::Worker;
use crate::plan::role;

const MODE: &str = "--disaggregation-mode";
/// Those of `dynamo.vllm` before 1.0.
const OLDER: [(&str, &str); 2] = [
    ("--is-prefill-worker", "prefill"),
    ("--is-decode-worker", "decode"),
];

/// Becomes the worker.
///
/// # Errors
/// When the role is not said clearly, or its program is not there. Returns in no other case.
pub(crate) fn run(args: &Worker) -> Result<()> {
    let asked = Asked::read(&args.args, |name| std::env::var(name).ok())?;
    for (old, new) in &asked.deprecated {
        eprintln!("stator: {old} is an older spelling of {new}");
    }
    let dir = checks::bin()?;
    let program = dir.join(role::program(asked.role));
    ensure!(
        program.is_file(),
        "there is no {} worker here: {} is not in {}",
        asked.role,
        role::program(asked.role),
        dir.display()
    );
    let mut command = Command::new(&program);
    command.args(&asked.rest);
    for name in of_the_role() {
        // A flag may have overruled it.
        command.env_remove(name);
    }
    let error = command.exec();
    Err(error).with_context(|| format!("become {}", program.display()))
}

/// What a command line asks for.
#[derive(Debug)]
struct Asked {
    role: Role,
    /// What the worker is given.
    rest: Vec<OsString>,
    /// Older spellings that were used, and what they stand for; each once.
    deprecated: Vec<(&'static str, String)>,
}

impl Asked {
    fn read(args: &[OsString], environment: impl Fn(&str) -> Option<String>) -> Result<Asked> {
        let mut said: Vec<String> = Vec::new();
        let mut rest = Vec::new();
        let mut deprecated = Vec::new();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                rest.push(arg.clone());
                rest.extend(args.cloned());
                break;
            }
            // Dynamo's parser takes underscores, too.
            let text = arg.to_string_lossy().replace('_', "-");
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (text.as_str(), None),
            };
            if let Some((old, mode)) = OLDER.iter().find(|(old, _)| *old == name) {
                if value.is_none_or(is_true) {
                    said.push((*mode).to_owned());
                }
                let hint = (*old, format!("{MODE} {mode}"));
                if !deprecated.contains(&hint) {
                    deprecated.push(hint);
                }
            } else if name == MODE {
                let next = || args.next()?.to_str();
                let mode = value.or_else(next);
                let mode = mode.with_context(|| format!("{MODE} needs a value"))?;
                said.push(mode.to_owned());
            } else {
                rest.push(arg.clone());
            }
        }
        let mut roles = said
            .iter()
            .map(|mode| role_of(mode))
            .collect::<Result<Vec<_>>>()?;
        roles.dedup();
        let role = match roles.as_slice() {
            [] => from_environment(environment)?,
            [role] => *role,
            roles => {
                let names: Vec<String> = roles.iter().map(Role::to_string).collect();
                bail!(
                    "a worker has one role, and this one is to be {}: keep one {MODE}",
                    names.join(" and ")
                );
            }
        };
        Ok(Asked {
            role,
            rest,
            deprecated,
        })
    }
}

fn from_environment(environment: impl Fn(&str) -> Option<String>) -> Result<Role> {
    let mut set = DISAGGREGATION_MODE.iter().filter_map(|name| {
        let value = environment(name).filter(|value| !value.is_empty())?;
        Some((name, value))
    });
    if let Some((name, value)) = set.next() {
        return role_of(&value).with_context(|| format!("read {name}"));
    }
    let is_set = |names: &[&str]| {
        let mut values = names.iter().filter_map(|name| environment(name));
        values.any(|value| !value.is_empty() && is_true(&value))
    };
    match (is_set(IS_PREFILL_WORKER), is_set(IS_DECODE_WORKER)) {
        (false, false) => Ok(Role::Agg),
        (true, false) => Ok(Role::Prefill),
        (false, true) => Ok(Role::Decode),
        (true, true) => bail!(
            "a worker has one role, and this one is to be prefill and decode: keep one of {} and {}",
            IS_PREFILL_WORKER.join(", "),
            IS_DECODE_WORKER.join(", ")
        ),
    }
}

/// Reads the value of a flag that mostly has none.
fn is_true(value: &str) -> bool {
    !matches!(value.to_ascii_lowercase().as_str(), "false" | "0" | "no")
}

fn role_of(mode: &str) -> Result<Role> {
    Ok(match mode {
        "agg" | "pd" => Role::Agg,
        "prefill" => Role::Prefill,
        "decode" => Role::Decode,
        "encode" => Role::Encode,
        other => bail!("'{other}' is no role: expected agg, pd, prefill, decode or encode"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, variables: &[(&str, &str)]) -> Result<Asked> {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Asked::read(&args, |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn every_spelling_of_a_role_is_understood_and_taken_out() {
        for (line, role) in [
            ("--model m -x", Role::Agg),
            ("--model m --disaggregation-mode pd -x", Role::Agg),
            ("--disaggregation-mode=prefill --model m -x", Role::Prefill),
            ("--model m --disaggregation_mode decode -x", Role::Decode),
            ("--model m -x --disaggregation-mode encode", Role::Encode),
            ("--is-prefill-worker --model m -x", Role::Prefill),
            ("--is-prefill-worker=false --model m -x", Role::Agg),
            (
                "--model m --is-decode-worker --disaggregation-mode decode -x",
                Role::Decode,
            ),
        ] {
            let asked = read(line, &[]).unwrap();
            assert_eq!(asked.role, role, "{line}");
            assert_eq!(asked.rest, ["--model", "m", "-x"], "{line}");
        }
    }

    #[test]
    fn an_older_spelling_names_the_new_one_once() {
        let asked = read("--is-prefill-worker --is-prefill-worker", &[]).unwrap();
        let hint = (
            "--is-prefill-worker",
            "--disaggregation-mode prefill".to_owned(),
        );
        assert_eq!(asked.deprecated, [hint]);
    }

    #[test]
    fn flags_win_over_the_environment() {
        let set = [
            ("DYN_DISAGGREGATION_MODE", ""),
            ("DYN_VLLM_DISAGGREGATION_MODE", "decode"),
        ];
        assert_eq!(read("m", &set).unwrap().role, Role::Decode);
        assert_eq!(
            read("m --is-prefill-worker", &set).unwrap().role,
            Role::Prefill
        );
    }

    #[test]
    fn two_roles_none_and_an_unknown_one_are_refused() {
        for line in [
            "--is-prefill-worker --is-decode-worker",
            "--disaggregation-mode",
            "--disaggregation-mode both",
        ] {
            assert!(read(line, &[]).is_err(), "{line}");
        }
        assert!(read("m", &[("DYN_DISAGGREGATION_MODE", "both")]).is_err());
        let older = |name| read("m", &[(name, "true")]).unwrap().role;
        assert_eq!(older("DYN_VLLM_IS_PREFILL_WORKER"), Role::Prefill);
        assert_eq!(older("DYN_VLLM_IS_DECODE_WORKER"), Role::Decode);
    }

    #[test]
    fn what_follows_two_dashes_is_the_engines() {
        let asked = read("m -- --is-prefill-worker", &[]).unwrap();
        assert_eq!(asked.role, Role::Agg);
        assert_eq!(asked.rest, ["m", "--", "--is-prefill-worker"]);
    }
}
