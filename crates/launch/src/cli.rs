//! The command line of `stator`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Print a shell completion script.
    Completions { shell: clap_complete::Shell },
}

/// What drives a worker's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// A real vLLM engine per worker.
    Vllm,
    /// The simulated engine: needs the model folder for its tokenizer and configuration only.
    Sim,
    /// Workers only listen; engines are started elsewhere with `vllm serve --headless`.
    Attach,
}

impl Engine {
    /// Returns the value that a worker's `--engine` takes.
    pub(crate) fn as_flag(self) -> &'static str {
        match self {
            Engine::Vllm => "vllm",
            Engine::Sim => "sim",
            Engine::Attach => "attach",
        }
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Up {
    /// Model folder or Hugging Face id.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    pub(crate) positional_model: Option<String>,

    /// The same, as a flag.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// Name under which clients ask for the model. Repeat for aliases. Default: the model as given.
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,

    /// Aggregated workers, one engine each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) workers: u16,

    /// How the processor chooses a worker: round-robin, random, least-loaded.
    #[arg(
        long,
        visible_alias = "router-mode",
        default_value = "round-robin",
        value_name = "POLICY"
    )]
    pub(crate) router: String,

    /// What drives the workers.
    #[arg(long, value_enum, default_value = "vllm")]
    pub(crate) engine: Engine,

    /// With `--engine attach`: worker i listens for its engine's handshake on this port + i.
    #[arg(long, default_value_t = 29550, value_name = "PORT")]
    pub(crate) attach_port: u16,

    /// Engines survive this launcher; the next `stator up` of the same name adopts them without loading again.
    #[arg(long)]
    pub(crate) engine_keep: bool,

    /// Address on which the OpenAI API listens. Anything but loopback is open to others: set `--api-key`.
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    pub(crate) http_host: String,

    /// Port of the OpenAI API.
    #[arg(long, default_value_t = 8000, value_name = "PORT")]
    pub(crate) http_port: u16,

    /// Key that clients must send as bearer token. Repeat for several.
    #[arg(
        long,
        env = "STATOR_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub(crate) api_key: Vec<String>,

    /// File with one API key a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,

    /// Further argument for the processor, given as it is. Repeat for several.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) processor_arg: Vec<String>,

    /// Name of this topology; two of different names run side by side.
    #[arg(long, default_value = "default")]
    pub(crate) name: String,

    /// Where state and logs go. Default: a folder of this user under the temporary directory.
    #[arg(long, env = "STATOR_STATE_DIR", value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Time that running requests get to finish after Ctrl-C. A second Ctrl-C ends at once.
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) drain_grace: Duration,

    /// Print lines instead of a live table. Default when the output is not a terminal.
    #[arg(long)]
    pub(crate) plain: bool,

    /// Flags for every worker and, through it, for vLLM (after `--`).
    #[arg(last = true, value_name = "VLLM FLAGS")]
    pub(crate) worker_args: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Where state and logs are. Default: a folder of this user under the temporary directory.
    #[arg(long, env = "STATOR_STATE_DIR", value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
