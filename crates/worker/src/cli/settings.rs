//! What a person may set on a worker, flag by flag.

use std::{path::PathBuf, time::Duration};

use clap::{ValueEnum, builder::BoolishValueParser};
use serde::{Deserialize, Serialize};
use stator_common::{
    card::{Endpoint, Role},
    settings::{
        DiscoveryBackend, EtcdSettings, EventPlane, KubernetesSettings, NatsSettings,
        RequestPlaneTls, duration,
    },
};
use stator_engine::handoff::ShortName;

/// What a person may set. Absent fields leave the choice to the layer below.
#[derive(Clone, Debug, Default, clap::Args, Serialize)]
pub struct Settings {
    /// Model folder or Hugging Face id; the first argument without a dash, or --model.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,

    /// Names that clients may use for the model; the first is its id [default: MODEL].
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = "Model")]
    pub served_model_name: Option<Vec<String>>,

    /// Chat template, a Jinja file, in place of the model's own.
    #[arg(
        long,
        alias = "custom-jinja-template",
        value_name = "FILE",
        help_heading = "Model"
    )]
    pub chat_template: Option<String>,

    /// Finds tool calls in the model's output.
    #[arg(
        long,
        alias = "dyn-tool-call-parser",
        value_name = "NAME",
        help_heading = "Model"
    )]
    pub tool_call_parser: Option<String>,

    /// Tells thoughts from answers in the model's output; given to the engine too, which then leaves
    /// thoughts out of structured outputs.
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub reasoning_parser: Option<String>,

    /// The same for the output alone, where the engine's parser has another name or none.
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    pub dyn_reasoning_parser: Option<String>,

    /// Accepted as vLLM accepts it: tools are chosen by the model wherever there is a parser.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", hide = true)]
    pub enable_auto_tool_choice: Option<bool>,

    /// Keeps deployments apart [default: dynamo].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub namespace: Option<String>,

    /// Kind of worker [default: backend].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub component_name: Option<String>,

    /// Function of the worker [default: generate].
    #[arg(long, value_name = "NAME", help_heading = "Place")]
    pub endpoint_name: Option<String>,

    /// All three at once: dyn://namespace.component.endpoint.
    #[arg(long, value_name = "DYN", help_heading = "Place")]
    #[serde(with = "crate::config::as_text")]
    pub endpoint: Option<Endpoint>,

    /// What kind of worker this is meant to be: refused if it is another.
    #[arg(long, value_name = "MODE", help_heading = "Place")]
    pub disaggregation_mode: Option<Mode>,

    /// The same as --disaggregation-mode prefill.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", hide = true,
          value_parser = BoolishValueParser::new())]
    pub is_prefill_worker: Option<bool>,

    /// The same as --disaggregation-mode decode.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", hide = true,
          value_parser = BoolishValueParser::new())]
    pub is_decode_worker: Option<bool>,

    /// Where the worker makes itself known [default: file].
    #[arg(
        long,
        alias = "store-kv",
        value_name = "BACKEND",
        help_heading = "Place"
    )]
    pub discovery_backend: Option<DiscoveryBackend>,

    /// Folder of the file discovery [default: stator-UID in the temporary folder].
    #[arg(long, alias = "file-kv", value_name = "DIR", help_heading = "Place")]
    pub discovery_path: Option<PathBuf>,

    /// How etcd is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    pub etcd: EtcdSettings,

    /// How Kubernetes is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    pub kubernetes: KubernetesSettings,

    /// How the NATS server is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    pub nats: NatsSettings,

    /// How requests come: tcp (frames, the fastest), http (gRPC) or nats [default: tcp].
    #[arg(long, value_name = "PLANE", help_heading = "Request plane")]
    pub request_plane: Option<RequestPlane>,

    /// Its certificates.
    #[command(flatten)]
    #[serde(skip_serializing_if = "RequestPlaneTls::is_empty")]
    pub request_plane_tls: RequestPlaneTls,

    /// How events about KV go: straight (zmq), or over a NATS server [default: zmq].
    #[arg(long, value_name = "PLANE", help_heading = "Listeners")]
    pub event_plane: Option<EventPlane>,

    /// Who tells processors what the engines cache: a relay in this worker (embedded), the
    /// stator-kv-relay of this machine (node), or nobody [default: off].
    #[arg(long, value_name = "WHERE", help_heading = "KV events")]
    pub kv_relay: Option<KvRelay>,

    /// Where processors reach the relay of this machine, host:port; over NATS only the port counts, which is the relay's
    /// --port [default: this worker's host, 5590].
    #[arg(long, value_name = "ADDRESS", help_heading = "KV events")]
    pub kv_relay_address: Option<String>,

    /// Port of the relay in this worker; it takes the next one too. 0 takes two free ones [default: 0].
    #[arg(long, value_name = "PORT", help_heading = "KV events")]
    pub kv_relay_port: Option<u16>,

    /// Has the engines publish KV events though no relay of ours listens.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          value_parser = BoolishValueParser::new(), help_heading = "KV events")]
    pub enable_kv_events: Option<bool>,

    /// The same as --event-plane, in Dynamo's words.
    #[arg(long, value_name = "PLANE", help_heading = "KV events")]
    pub kv_events_publisher_type: Option<EventPlane>,

    /// First port of the engines' KV events: rank i publishes on PORT + i and tells again on PORT + ranks + i
    /// [default: files in the engines' folders].
    #[arg(long, value_name = "PORT", help_heading = "KV events")]
    pub kv_event_port: Option<u16>,

    /// Address to take requests on [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    pub host: Option<String>,

    /// Port to take requests on; 0 takes a free one [default: 0].
    #[arg(long, value_name = "PORT", help_heading = "Listeners")]
    pub port: Option<u16>,

    /// Host under which processors reach this worker [default: --host; of a wildcard, this machine's address].
    #[arg(long, value_name = "HOST", help_heading = "Listeners")]
    pub advertise_host: Option<String>,

    /// File with the secret that processors must present; needed beyond loopback.
    /// The variable STATOR_PLANE_TOKEN may hold the secret itself.
    #[arg(long, value_name = "FILE", help_heading = "Listeners")]
    pub plane_token_file: Option<PathBuf>,

    /// Takes requests beyond loopback from anybody.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Listeners")]
    pub insecure_plane: Option<bool>,

    /// Address of /health, /live, /status and /metrics [default: 127.0.0.1].
    #[arg(long, value_name = "ADDRESS", help_heading = "Listeners")]
    pub system_host: Option<String>,

    /// Port of /health, /live, /status and /metrics; 0 takes a free one, -1 none [default: -1].
    #[arg(long, value_name = "PORT", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-1..=65535), help_heading = "Listeners")]
    pub system_port: Option<i32>,

    /// What computes [default: vllm, or attach with --engine-attach].
    #[arg(long, value_name = "KIND", help_heading = "Engine")]
    pub engine: Option<EngineKind>,

    /// Only listens here (tcp://host:port); the engine is started elsewhere with `vllm serve --headless`
    /// and dials in. Data-parallel rank i listens on port + i.
    #[arg(long, value_name = "ADDRESS", help_heading = "Engine")]
    pub engine_attach: Option<String>,

    /// Host under which an engine started elsewhere reaches this worker.
    #[arg(long, value_name = "HOST", help_heading = "Engine")]
    pub engine_advertise_host: Option<String>,

    /// The simulated engine's program [default: stator-sim beside this one, or on the PATH].
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    pub engine_command: Option<PathBuf>,

    /// What moves KV in and out of the engine, one or several in this order; stands for vLLM's
    /// --kv-transfer-config. Prefill and decode workers need nixl, or lmcache by itself.
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',', help_heading = "Engine")]
    pub connector: Option<Vec<ShortName>>,

    /// Python with vLLM [default: that of VLLM_VENV, VIRTUAL_ENV or ./.venv, or python3].
    #[arg(long, value_name = "FILE", help_heading = "Engine")]
    pub python: Option<PathBuf>,

    /// Lets the engine outlive this worker; the next one with the same --run-dir takes it over.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Engine")]
    pub engine_keep: Option<bool>,

    /// The engine's folder: endpoints, log, the record of a kept engine [default: one below the
    /// temporary folder].
    #[arg(long, value_name = "DIR", help_heading = "Engine")]
    pub run_dir: Option<PathBuf>,

    /// Independent engines of a dense model, each a target for routing [default: 1].
    #[arg(long, alias = "dp-size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256),
          help_heading = "Engine")]
    pub data_parallel_size: Option<u32>,

    /// Lets those engines share GPUs where there are too few for each to have its own (with vLLM's
    /// --gpu-memory-utilization): the ones in CUDA_VISIBLE_DEVICES in turn, else the first.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          value_parser = BoolishValueParser::new(), help_heading = "Engine")]
    pub share_gpus: Option<bool>,

    /// Runs a further node of an engine that spans several machines (--nnodes, --node-rank, --master-addr):
    /// vLLM alone, which takes no requests.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          value_parser = BoolishValueParser::new(), help_heading = "Engine")]
    pub headless: Option<bool>,

    /// Accepts a vLLM outside the versions that the wire was tested with.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Engine")]
    pub any_vllm_version: Option<bool>,

    /// Time for an engine to become ready [default: 10m].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Engine")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub engine_ready_timeout: Option<Duration>,

    /// Time that running requests get to finish when the worker is told to end [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "End")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub drain_grace: Option<Duration>,

    /// vLLM's flags, verbatim.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_args: Option<Vec<String>>,
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestPlane {
    /// One multiplexed connection per processor (`proto/README.md`).
    Tcp,
    /// gRPC over HTTP/2.
    Http,
    /// Over a NATS server.
    Nats,
}

/// Who tells what engines cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvRelay {
    /// Nobody.
    Off,
    /// The relay of the machine, a process of its own.
    Node,
    /// This worker.
    Embedded,
}

/// What kind of worker is meant, in Dynamo's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Prefill and decode in one engine.
    Agg,
    /// The same.
    Pd,
    /// Computes prompts and hands their KV on.
    Prefill,
    /// Continues prompts that a prefill worker computed.
    Decode,
    /// Runs the vision encoder.
    Encode,
}

impl Mode {
    /// Returns the role that is meant.
    pub fn role(self) -> Role {
        match self {
            Self::Agg | Self::Pd => Role::Agg,
            Self::Prefill => Role::Prefill,
            Self::Decode => Role::Decode,
            Self::Encode => Role::Encode,
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// vLLM, started by this worker.
    Vllm,
    /// The simulated engine, started by this worker.
    Sim,
    /// vLLM, started elsewhere.
    Attach,
}
