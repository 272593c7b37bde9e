//! The command line of `stator`.

mod up;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueHint};
use stator_common::card::Role;

pub(crate) use up::{Engine, Up};

use crate::plan::role;

/// Serve a model on vLLM: one command starts the processor and its workers.
#[derive(Debug, Parser)]
#[command(name = "stator", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a processor and its workers, show them, and drain them on Ctrl-C.
    Up(Box<Up>),
    /// Show the topologies that run on this machine.
    Status(Status),
    /// Add or remove workers of a running topology; requests go on.
    Scale(Scale),
    /// Drain a running topology and wait for its end.
    Down(Down),
    /// Check everything that `up` with the same flags would need; start nothing.
    Doctor(Box<Up>),
    /// Become the worker that a command line of `python -m dynamo.vllm` asks for.
    #[command(disable_help_flag = true)]
    Worker(Worker),
    /// Print a shell completion script.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Where state and logs are. Default: a folder of this user under the temporary directory.
    #[arg(long, env = "STATOR_STATE_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which of the topologies that run.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Name of the topology.
    #[arg(long, default_value = "default")]
    pub(crate) name: String,

    /// Where state and logs are. Default: a folder of this user under the temporary directory.
    #[arg(long, env = "STATOR_STATE_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Scale {
    /// How many workers of a role there shall be: agg=1 prefill=2 decode=3. Roles not named keep theirs.
    #[arg(value_name = "ROLE=N", required = true, value_parser = count)]
    pub(crate) counts: Vec<(Role, u16)>,

    #[command(flatten)]
    pub(crate) which: Which,

    /// Do not wait until new workers are ready and removed ones are gone.
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    pub(crate) which: Which,

    /// Cut off what runs instead of letting it finish.
    #[arg(long)]
    pub(crate) now: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// What follows `python -m dynamo.vllm`. The role is said by --disaggregation-mode agg|pd|prefill|decode|encode
    /// (or DYN_DISAGGREGATION_MODE), or in its older spellings; everything else goes to the worker as it is.
    #[arg(
        value_name = "ARGS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) args: Vec<OsString>,
}

/// Reads `prefill=2`.
fn count(text: &str) -> Result<(Role, u16), String> {
    let (name, number) = text
        .split_once('=')
        .ok_or("expected ROLE=N, as in prefill=2")?;
    let role = role::parse(name).ok_or_else(|| {
        format!("'{name}' is no role of a worker: expected agg, prefill or decode")
    })?;
    match number.parse() {
        Ok(number) if number <= up::MOST => Ok((role, number)),
        Ok(_) | Err(_) => Err(format!("'{number}' is no number from 0 to {}", up::MOST)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_count_names_a_role_and_a_number() {
        assert_eq!(count("prefill=2"), Ok((Role::Prefill, 2)));
        for text in ["prefill", "prefil=2", "decode=many", "agg=-1", "agg=70000"] {
            assert!(count(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_worker_takes_every_argument_as_it_is() {
        let line = [
            "stator", "worker", "--model", "m", "--help", "-tp", "2", "--", "-x",
        ];
        let Command::Worker(worker) = Cli::try_parse_from(line).unwrap().command else {
            panic!("not `worker`");
        };
        assert_eq!(worker.args, line[2..]);
    }

    #[test]
    fn completions_know_every_command_and_flag() {
        for shell in [
            clap_complete::Shell::Bash,
            clap_complete::Shell::Zsh,
            clap_complete::Shell::Fish,
        ] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "stator", &mut script);
            let script = String::from_utf8(script).unwrap();
            for command in Cli::command().get_subcommands() {
                assert!(
                    script.contains(command.get_name()),
                    "{shell}: {}",
                    command.get_name()
                );
                for flag in command.get_arguments().filter_map(clap::Arg::get_long) {
                    assert!(script.contains(flag), "{shell}: {flag}");
                }
            }
        }
    }
}
