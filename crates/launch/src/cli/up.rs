//! What `stator up` takes, and `stator doctor` with it: everything that says what a topology consists of.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use stator_common::settings::NatsSettings;
use stator_engine::handoff::ShortName;

/// Most workers of one role on one machine.
pub(super) const MOST: u16 = 256;

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
    #[arg(value_name = "MODEL", conflicts_with = "model", value_hint = ValueHint::DirPath)]
    pub(crate) positional_model: Option<String>,

    /// The same, as a flag.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub(crate) model: Option<String>,

    /// Name under which clients ask for the model. Repeat for aliases. Default: the model as given.
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,

    /// Aggregated workers, one engine each. Default: 1, or none beside prefill and decode workers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=i64::from(MOST)), help_heading = "Workers")]
    pub(crate) workers: Option<u16>,

    /// Workers that compute prompts and hand their KV on; with --decode-workers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)), help_heading = "Workers")]
    pub(crate) prefill_workers: Option<u16>,

    /// Workers that continue those prompts; with --prefill-workers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)), help_heading = "Workers")]
    pub(crate) decode_workers: Option<u16>,

    /// GPUs over which each aggregated worker's engine is split (vLLM's --tensor-parallel-size).
    #[arg(long, visible_alias = "tensor-parallel-size", value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Workers")]
    pub(crate) tp: Option<u16>,

    /// The same for prefill workers.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Workers")]
    pub(crate) prefill_tp: Option<u16>,

    /// The same for decode workers: as for prefill workers, or a multiple or a divisor of it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Workers")]
    pub(crate) decode_tp: Option<u16>,

    /// Data-parallel ranks of each worker; each is a target for routing.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)), help_heading = "Workers")]
    pub(crate) data_parallel_size: Option<u16>,

    /// How KV moves between engines. Repeat for several, tried in this order. Default: nixl for prefill and decode
    /// workers.
    #[arg(
        long,
        value_name = "CONNECTOR",
        value_delimiter = ',',
        help_heading = "Workers"
    )]
    pub(crate) connector: Vec<ShortName>,

    /// How requests go to workers: tcp (the fastest), http (gRPC) or nats. Default: tcp.
    #[arg(long, value_name = "PLANE", value_parser = ["tcp", "http", "nats"], help_heading = "Workers")]
    pub(crate) request_plane: Option<String>,

    /// Further argument for every prefill worker, given as it is. Repeat for several.
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        help_heading = "Workers"
    )]
    pub(crate) prefill_arg: Vec<String>,

    /// Further argument for every decode worker, given as it is. Repeat for several.
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        help_heading = "Workers"
    )]
    pub(crate) decode_arg: Vec<String>,

    /// Let all workers see all GPUs, instead of giving each its own: for small engines that share one
    /// (with vLLM's --gpu-memory-utilization).
    #[arg(long, help_heading = "Workers")]
    pub(crate) share_gpus: bool,

    /// Start the engine of a secondary node and nothing else; the flags after `--` say where the first node is.
    #[arg(long, help_heading = "Workers")]
    pub(crate) headless: bool,

    /// With --headless: what the worker is whose engine this node belongs to. Default: agg.
    #[arg(long, value_name = "ROLE", requires = "headless", value_parser = ["agg", "prefill", "decode"],
          help_heading = "Workers")]
    pub(crate) disaggregation_mode: Option<String>,

    /// How the processor chooses a worker: kv by what each one's KV cache holds, approx by what each was sent lately,
    /// direct as each request says.
    #[arg(long, visible_alias = "router-mode", default_value = "round-robin", value_name = "POLICY",
          value_parser = ["round-robin", "random", "least-loaded", "kv", "approx", "direct"], help_heading = "Routing")]
    pub(crate) router: String,

    /// How workers tell processors what their caches hold, and processors each other what they booked: zmq or nats. Default: zmq.
    #[arg(long, value_name = "PLANE", value_parser = ["zmq", "nats"], help_heading = "Routing")]
    pub(crate) event_plane: Option<String>,

    /// How the NATS server is reached, for the planes of that name. Passwords are taken from the environment, too.
    #[command(flatten)]
    pub(crate) nats: NatsSettings,

    /// When a decode worker may compute a prompt itself.
    #[arg(long, value_name = "MODE", value_parser = ["off", "fixed", "auto"], help_heading = "Routing")]
    pub(crate) conditional_disagg: Option<String>,

    /// Prompts with fewer uncached tokens go straight to a decode worker; without --router kv or approx all tokens count.
    #[arg(long, value_name = "TOKENS", help_heading = "Routing")]
    pub(crate) disagg_min_prefill_tokens: Option<u64>,

    /// So do prompts that would find more tokens than this in the queues of prefill workers.
    #[arg(long, value_name = "TOKENS", help_heading = "Routing")]
    pub(crate) disagg_max_prefill_queue: Option<u64>,

    /// When a prompt is given to a prefill worker: at once (push, which processors do unless told otherwise), or when one
    /// has room (queue).
    #[arg(long, value_name = "WHEN", value_parser = ["push", "queue"], help_heading = "Routing")]
    pub(crate) prefill_dispatch: Option<String>,

    /// What drives the workers.
    #[arg(long, value_enum, default_value = "vllm", help_heading = "Engine")]
    pub(crate) engine: Engine,

    /// With `--engine attach`: worker i listens for its engine's handshake on this port + i.
    #[arg(
        long,
        default_value_t = 29550,
        value_name = "PORT",
        help_heading = "Engine"
    )]
    pub(crate) attach_port: u16,

    /// Engines survive this launcher; the next `stator up` of the same name adopts them without loading again.
    #[arg(long, help_heading = "Engine")]
    pub(crate) engine_keep: bool,

    /// Address on which the OpenAI API listens. Anything but loopback is open to others: set `--api-key`.
    #[arg(
        long,
        default_value = "127.0.0.1",
        value_name = "HOST",
        help_heading = "API"
    )]
    pub(crate) http_host: String,

    /// Port of the OpenAI API.
    #[arg(
        long,
        default_value_t = 8000,
        value_name = "PORT",
        help_heading = "API"
    )]
    pub(crate) http_port: u16,

    /// Key that clients must send as bearer token. Repeat for several.
    #[arg(
        long,
        env = "STATOR_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        help_heading = "API"
    )]
    pub(crate) api_key: Vec<String>,

    /// File with one API key a line.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "API")]
    pub(crate) api_key_file: Option<PathBuf>,

    /// Further argument for the processor, given as it is. Repeat for several.
    #[arg(
        long,
        value_name = "ARG",
        allow_hyphen_values = true,
        help_heading = "API"
    )]
    pub(crate) processor_arg: Vec<String>,

    /// Name of this topology; two of different names run side by side.
    #[arg(long, default_value = "default")]
    pub(crate) name: String,

    /// Where state and logs go. Default: a folder of this user under the temporary directory.
    #[arg(long, env = "STATOR_STATE_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,

    /// Time that running requests get to finish after Ctrl-C, and on a worker that is removed. A second Ctrl-C ends
    /// at once.
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) drain_grace: Duration,

    /// Print lines instead of a live table. Default when the output is not a terminal.
    #[arg(long)]
    pub(crate) plain: bool,

    /// Flags for every worker and, through it, for vLLM (after `--`).
    #[arg(last = true, value_name = "VLLM FLAGS")]
    pub(crate) worker_args: Vec<String>,
}

impl Up {
    /// Returns the model, however it was given.
    pub(crate) fn model(&self) -> Option<&str> {
        let positional = self.positional_model.as_deref();
        positional.or(self.model.as_deref())
    }
}
