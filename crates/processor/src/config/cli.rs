//! What a person may say to a processor: on the command line, or in the environment, which is turned into
//! flags so that both are parsed, named and refused alike.

use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde::Serialize;
use stator_common::settings::{
    DiscoveryBackend, EtcdSettings, EventPlane, KubernetesSettings, NatsSettings, RequestPlaneTls,
    Secret, Variables, duration,
};

use super::{ConditionalMode, ConfigError, ReasoningField, SessionAffinity};
use crate::fleet::PrefillDispatch;
use crate::pool::RouterMode;

/// Flags of the processor alone that the environment may give. The `DYN_*` names are Dynamo's (frontend, 1.6).
pub(super) const ENVIRONMENT: Variables = Variables(&[
    ("http-host", &["STATOR_HTTP_HOST", "DYN_HTTP_HOST"]),
    ("http-port", &["STATOR_HTTP_PORT", "DYN_HTTP_PORT"]),
    ("router-mode", &["STATOR_ROUTER_MODE", "DYN_ROUTER_MODE"]),
    (
        "router-temperature",
        &["STATOR_ROUTER_TEMPERATURE", "DYN_ROUTER_TEMPERATURE"],
    ),
    ("router-decode-weight", &["STATOR_ROUTER_DECODE_WEIGHT"]),
    ("event-plane", &["STATOR_EVENT_PLANE", "DYN_EVENT_PLANE"]),
    (
        "router-replica-sync",
        &["STATOR_ROUTER_REPLICA_SYNC", "DYN_ROUTER_REPLICA_SYNC"],
    ),
    ("router-sync-host", &["STATOR_ROUTER_SYNC_HOST"]),
    ("router-sync-port", &["STATOR_ROUTER_SYNC_PORT"]),
    ("session-affinity", &["STATOR_SESSION_AFFINITY"]),
    ("api-key", &["STATOR_API_KEY"]),
    ("api-key-file", &["STATOR_API_KEY_FILE"]),
    ("metrics-auth", &["STATOR_METRICS_AUTH"]),
    (
        "tls-cert-path",
        &["STATOR_TLS_CERT_PATH", "DYN_TLS_CERT_PATH"],
    ),
    ("tls-key-path", &["STATOR_TLS_KEY_PATH", "DYN_TLS_KEY_PATH"]),
    (
        "threads",
        &["STATOR_THREADS", "DYN_RUNTIME_NUM_WORKER_THREADS"],
    ),
    ("request-plane-tls-name", &["STATOR_REQUEST_PLANE_TLS_NAME"]),
    ("max-body-bytes", &["STATOR_MAX_BODY_BYTES"]),
    ("header-timeout", &["STATOR_HEADER_TIMEOUT"]),
    ("body-timeout", &["STATOR_BODY_TIMEOUT"]),
    ("idle-timeout", &["STATOR_IDLE_TIMEOUT"]),
    ("request-timeout", &["STATOR_REQUEST_TIMEOUT"]),
    ("conditional-disagg", &["STATOR_CONDITIONAL_DISAGG"]),
    (
        "disagg-min-prefill-tokens",
        &["STATOR_DISAGG_MIN_PREFILL_TOKENS"],
    ),
    (
        "disagg-max-prefill-queue",
        &["STATOR_DISAGG_MAX_PREFILL_QUEUE"],
    ),
    ("prefill-dispatch", &["STATOR_PREFILL_DISPATCH"]),
    ("prefill-queue-limit", &["STATOR_PREFILL_QUEUE_LIMIT"]),
    (
        "trust-request-chat-template",
        &["STATOR_TRUST_REQUEST_CHAT_TEMPLATE"],
    ),
    (
        "reasoning-field-name",
        &["STATOR_REASONING_FIELD_NAME", "DYN_REASONING_FIELD_NAME"],
    ),
]);

/// The OpenAI-compatible front of Stator: validates, tokenizes, routes to workers, streams the answers.
#[derive(Debug, Parser)]
#[command(name = "stator-processor", version, max_term_width = 100)]
pub struct Cli {
    /// Reads settings from this TOML file; its keys are the names below with underscores.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Prints the configuration that results from file, environment and flags, and ends.
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,

    /// The settings that flags, environment and file have in common.
    #[command(flatten)]
    pub settings: Settings,
}

/// What a person may set. Absent fields leave the choice to the layer below.
#[derive(Debug, Default, clap::Args, Serialize)]
pub struct Settings {
    /// Address or name to listen on [default: 127.0.0.1].
    #[arg(long, alias = "host", value_name = "HOST", help_heading = "Listener")]
    http_host: Option<String>,

    /// Port to listen on; 0 takes a free one [default: 8000].
    #[arg(long, alias = "port", value_name = "PORT", help_heading = "Listener")]
    http_port: Option<u16>,

    /// Address of the system routes: /health, /live, /status, /metrics, /workers [default: 127.0.0.1].
    #[arg(long, value_name = "HOST", help_heading = "Listener")]
    system_host: Option<String>,

    /// Port of the system routes, which ask for no key; 0 takes a free one, -1 none [default: -1].
    #[arg(long, value_name = "PORT", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-1..=65535), help_heading = "Listener")]
    system_port: Option<i32>,

    /// Certificate chain (PEM); with --tls-key-path the listener speaks TLS only. Read again when it changes.
    #[arg(long, value_name = "FILE", help_heading = "Listener")]
    tls_cert_path: Option<PathBuf>,

    /// Private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", help_heading = "Listener")]
    tls_key_path: Option<PathBuf>,

    /// Key that clients must send as `Authorization: Bearer KEY`; may be given several times. Other
    /// processes of this machine can see flags: prefer a file or the environment.
    #[arg(
        long,
        value_name = "KEY",
        value_delimiter = ',',
        help_heading = "Access"
    )]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "reveal")]
    api_key: Option<Vec<Secret>>,

    /// File with one key per line; empty lines and lines that start with # are skipped.
    #[arg(long, value_name = "FILE", help_heading = "Access")]
    api_key_file: Option<PathBuf>,

    /// Asks for a key at /metrics and /workers too, where there are keys; the system routes never do [default:
    /// true].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Access")]
    metrics_auth: Option<bool>,

    /// Threads that serve connections [default: 0, one per eight cores].
    #[arg(long, value_name = "N", help_heading = "Limits")]
    threads: Option<usize>,

    /// Largest request body in bytes; larger ones get 413 [default: 67108864].
    #[arg(long, value_name = "BYTES", help_heading = "Limits")]
    max_body_bytes: Option<usize>,

    /// Time from a request's first byte to the end of its header [default: 15s].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    header_timeout: Option<Duration>,

    /// Longest pause while a request's body arrives [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    body_timeout: Option<Duration>,

    /// Time that a connection may stay open between two requests [default: 2m].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    idle_timeout: Option<Duration>,

    /// Longest time of a request, from its arrival to its last token; a request's own x-request-timeout-ms wins
    /// [default: none].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    request_timeout: Option<Duration>,

    /// Time that running requests get to finish when the process is told to end [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    drain_grace: Option<Duration>,

    /// File with the secret that workers ask processors for. The variable STATOR_PLANE_TOKEN may hold the
    /// secret itself.
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    plane_token_file: Option<PathBuf>,

    /// Accepted as Dynamo accepts it: every worker's card says how it takes requests.
    #[arg(long, value_name = "PLANE", value_parser = ["tcp", "http", "nats"], hide = true)]
    #[serde(skip)]
    request_plane: Option<String>,

    /// The certificates of the request plane.
    #[command(flatten)]
    #[serde(skip_serializing_if = "RequestPlaneTls::is_empty")]
    request_plane_tls: RequestPlaneTls,

    /// The name that workers' certificates must bear [default: the host in their address].
    #[arg(long, value_name = "NAME", help_heading = "Request plane")]
    #[serde(skip_serializing_if = "Option::is_none")]
    request_plane_tls_name: Option<String>,

    /// Uses the workers of this namespace only [default: those of every namespace].
    #[arg(long, value_name = "NAME", help_heading = "Workers")]
    namespace: Option<String>,

    /// How workers are found [default: file].
    #[arg(
        long,
        alias = "store-kv",
        value_name = "BACKEND",
        help_heading = "Workers"
    )]
    discovery_backend: Option<DiscoveryBackend>,

    /// Folder of the file discovery [default: one per user under the temporary folder].
    #[arg(long, alias = "file-kv", value_name = "DIR", help_heading = "Workers")]
    discovery_path: Option<PathBuf>,

    /// How etcd is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    etcd: EtcdSettings,

    /// How Kubernetes is reached.
    #[command(flatten)]
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    kubernetes: KubernetesSettings,

    /// How the NATS server is reached, by which some workers may be.
    #[command(flatten)]
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    nats: NatsSettings,

    /// How a worker is chosen for a request: round-robin, random, least-loaded, kv (by what each worker's KV cache
    /// holds, and by load), approx (the same, guessed from what each was sent lately) or direct (the one that
    /// x-stator-worker names). Without kv or approx, prefill workers are always chosen by the tokens that they
    /// have to compute [default: round-robin].
    #[arg(long, alias = "router", value_name = "MODE", help_heading = "Routing")]
    router_mode: Option<RouterMode>,

    /// With kv and approx: how freely dearer workers are chosen, against herds: one that is dearer by this share of
    /// the prompt is chosen e times less often [default: 0, never].
    #[arg(long, value_name = "SHARE", value_parser = not_negative, help_heading = "Routing")]
    router_temperature: Option<f64>,

    /// With kv and approx: what a token that a worker decodes from weighs beside one that it has to compute. More
    /// spreads streams more evenly and finds less in caches [default: 0.07].
    #[arg(long, value_name = "WEIGHT", value_parser = not_negative, help_heading = "Routing")]
    router_decode_weight: Option<f64>,

    /// Whether processors in front of the same workers find each other and tell each other what they have booked, so
    /// that they weigh it [default: true].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Routing")]
    router_replica_sync: Option<bool>,

    /// How other processors hear what this one has booked: straight (zmq), or over a NATS server [default: zmq].
    #[arg(long, value_name = "PLANE", help_heading = "Routing")]
    event_plane: Option<EventPlane>,

    /// Address of this machine under which other processors hear what this one has booked; there is no secret on it
    /// [default: 127.0.0.1, for processors of this machine only].
    #[arg(long, value_name = "HOST", help_heading = "Routing")]
    router_sync_host: Option<String>,

    /// Port for that; the next one is taken as well [default: 0, two free ones].
    #[arg(long, value_name = "PORT", help_heading = "Routing")]
    router_sync_port: Option<u16>,

    /// What makes requests a session, which keeps its worker while that has room: off, header (x-stator-session) or
    /// user (or else the body's user) [default: header].
    #[arg(long, value_name = "WHAT", help_heading = "Routing")]
    session_affinity: Option<SessionAffinity>,

    /// Whether a decode worker may compute a prompt itself instead of a prefill worker: off, fixed (by the two
    /// numbers below) or auto (from measured speeds and the load of the moment) [default: off, or fixed
    /// with one of the numbers].
    #[arg(long, value_name = "MODE", help_heading = "Disaggregation")]
    conditional_disagg: Option<ConditionalMode>,

    /// Prompts with fewer uncached tokens stay with a decode worker. What it has cached is known where that is routed
    /// by (kv, approx); elsewhere all tokens count.
    #[arg(long, value_name = "TOKENS", help_heading = "Disaggregation")]
    disagg_min_prefill_tokens: Option<u64>,

    /// Prompts stay with a decode worker while the prefill worker has more tokens than this to compute (with
    /// --prefill-dispatch queue: while more than this wait per prefill worker, here and there).
    #[arg(long, value_name = "TOKENS", help_heading = "Disaggregation")]
    disagg_max_prefill_queue: Option<u64>,

    /// When a prompt is given to a prefill worker: push (at once, to the one where it costs least, and it waits there)
    /// or queue (when one has room; until then it waits here, and goes where it is ready first as things are then, whatever
    /// the router's mode and its session say). Where prefill workers are reached over NATS, a queue is one line that all
    /// processors share; the server needs JetStream (nats-server -js) for it [default: push].
    #[arg(long, value_name = "WHEN", help_heading = "Disaggregation")]
    prefill_dispatch: Option<PrefillDispatch>,

    /// With --prefill-dispatch queue: prompts of a model that may wait here; more are refused with 429 [default: 8192].
    #[arg(long, value_name = "N", help_heading = "Disaggregation")]
    prefill_queue_limit: Option<usize>,

    /// Name of the field that carries a reasoning model's thoughts [default: reasoning_content].
    #[arg(long, value_name = "NAME", help_heading = "Answers")]
    reasoning_field_name: Option<ReasoningField>,

    /// Lets requests bring chat templates of their own; only for clients that are trusted [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
          help_heading = "Answers")]
    trust_request_chat_template: Option<bool>,
}

impl Cli {
    /// Parses the process's arguments; `--help` and errors end the process, as clap does.
    pub fn from_process() -> Self {
        let matches = command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Returns the command with the names that the environment may use written into the help.
pub fn command() -> clap::Command {
    ENVIRONMENT.told_by(Cli::command())
}

pub(super) fn from_environment(
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Settings, ConfigError> {
    let cli = Cli::try_parse_from(ENVIRONMENT.command_line(environment)).map_err(|error| {
        let message = error.to_string();
        let first = message.lines().next().unwrap_or_default();
        ConfigError::Environment(first.trim_start_matches("error: ").to_owned())
    })?;
    Ok(cli.settings)
}

pub(super) fn layer(settings: &Settings) -> toml::Table {
    toml::Table::try_from(settings).expect("settings hold only what TOML can say")
}

/// Writes secrets in full: between two layers of settings, never to a person.
fn reveal<S: serde::Serializer>(
    secrets: &Option<Vec<Secret>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(secrets.iter().flatten().map(Secret::reveal))
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &f64| number.is_finite() && *number >= 0.0)
        .ok_or_else(|| "expected a number that is not negative".to_owned())
}
