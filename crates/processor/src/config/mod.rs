//! What can be set on a processor, and where each setting comes from.
//!
//! One [`Settings`] holds what a person may say, each field optional. It is read three times: from the
//! file, from the environment (turned into flags, so that both are parsed and refused alike) and from
//! the command line; the later one wins, and [`Config`] holds the result with the defaults filled in.

mod cli;
mod load;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
pub use stator_common::settings::{
    DiscoveryBackend, EtcdSettings, EventPlane, KubernetesSettings, NatsSettings, RequestPlaneTls,
    Secret,
};

use stator_router::{Bounds, Conditional, DECODING};

use crate::fleet::{PrefillDispatch, Rules};
use crate::pool::{RouterMode, Routing};

pub use cli::{Cli, Settings, command};
pub use load::{ConfigError, load, to_toml};

/// A processor's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address or name to listen on. Default 127.0.0.1: this machine only.
    pub http_host: String,
    /// Port to listen on. 0 takes a free one. Default 8000.
    pub http_port: u16,
    /// Address of the system routes. Default 127.0.0.1.
    pub system_host: String,
    /// Port of the system routes, which ask for no key: /health, /live, /status, /metrics, /workers. 0 takes a
    /// free one; -1, the default, none.
    pub system_port: i32,
    /// Certificate chain (PEM). Absent: plain text. Goes with `tls_key_path`.
    pub tls_cert_path: Option<PathBuf>,
    /// Private key of the certificate (PEM).
    pub tls_key_path: Option<PathBuf>,
    /// Keys of which a client must send one. Empty, and no file: nobody is asked for a key.
    pub api_key: Vec<Secret>,
    /// File with further keys, one per line.
    pub api_key_file: Option<PathBuf>,
    /// Whether /metrics and /workers ask for a key as well, where there are keys. Default true: they show
    /// internal addresses, and scrapers have the system routes.
    pub metrics_auth: bool,
    /// Threads that serve connections. 0, the default: one per eight cores, at least one. A thread serves some
    /// ten thousand requests or hundreds of thousands of tokens per second; more of them than needed
    /// wake each other up. Long prompts have threads of their own.
    pub threads: usize,
    /// Largest request body in bytes. Default 64 MiB.
    pub max_body_bytes: usize,
    /// Time from the first byte of a request (or of a connection) to the end of its header. Default 15 s.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// Longest pause while a request's body arrives. Default 30 s.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// Time that a connection may stay open without a request. Default 2 min.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// Time that running requests get to finish after SIGTERM. Default 30 s; zero cuts them off at once.
    #[serde(with = "humantime_serde")]
    pub drain_grace: Duration,
    /// File with the secret that workers ask for. Absent: `STATOR_PLANE_TOKEN`, or none.
    pub plane_token_file: Option<PathBuf>,
    /// The secret that workers ask for, from that file or variable.
    #[serde(skip)]
    pub plane_token: Option<Secret>,
    /// The certificates of the request plane. Empty, the default: workers that speak TLS are refused.
    #[serde(skip_serializing_if = "RequestPlaneTls::is_empty")]
    pub request_plane_tls: RequestPlaneTls,
    /// The name that workers' certificates must bear. Absent: the host in their address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_plane_tls_name: Option<String>,
    /// Namespace whose workers are used. Absent: every namespace.
    pub namespace: Option<String>,
    /// How workers are found. Default `file`.
    pub discovery_backend: DiscoveryBackend,
    /// Folder of the file discovery. Absent: the default that workers use too.
    pub discovery_path: Option<PathBuf>,
    /// How etcd is reached.
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    pub etcd: EtcdSettings,
    /// How Kubernetes is reached.
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    pub kubernetes: KubernetesSettings,
    /// How the NATS server is reached, by which some workers may be. It is not needed before one is.
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    pub nats: NatsSettings,
    /// How a worker is chosen. Default `round-robin`.
    pub router_mode: RouterMode,
    /// With kv and approx: how freely dearer workers are chosen, as a share of the prompt by which a worker may be
    /// dearer than the cheapest to be chosen e times less often. Default 0: never.
    pub router_temperature: f64,
    /// With kv and approx: what a token that a worker decodes from weighs beside one that it has to compute. Default
    /// 0.07; more spreads streams more evenly and finds less in caches.
    pub router_decode_weight: f64,
    /// Whether processors in front of the same workers tell each other what they have booked. Default true; alone it
    /// costs nothing.
    pub router_replica_sync: bool,
    /// How others hear it. Default `zmq`: on ports of this processor.
    pub event_plane: EventPlane,
    /// Address or name of this machine under which other processors hear this one. Default 127.0.0.1: on this machine
    /// only.
    pub router_sync_host: String,
    /// Port for that; the next one is taken as well. 0, the default: two free ones.
    pub router_sync_port: u16,
    /// What makes requests a session, which keeps its worker while that has room, for ten minutes after its last
    /// request. Default `header`.
    pub session_affinity: SessionAffinity,
    /// Longest time of a request that names none itself (`x-request-timeout-ms`), from its arrival to its last
    /// token. Absent, the default: any.
    #[serde(
        with = "humantime_serde::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub request_timeout: Option<Duration>,
    /// When decode workers compute prompts themselves. Absent: by the two numbers below, if one is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conditional_disagg: Option<ConditionalMode>,
    /// Prompts with fewer uncached tokens stay with a decode worker. What it has cached is known where that is routed
    /// by (kv, approx); elsewhere all tokens count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disagg_min_prefill_tokens: Option<u64>,
    /// Prompts stay with a decode worker while the prefill worker has more tokens than this to compute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disagg_max_prefill_queue: Option<u64>,
    /// When a prompt is given to a prefill worker. Default `push`: what a session or the router's mode says counts at once,
    /// and conversations fare a little better (docs/benchmarks/dispatch.md).
    pub prefill_dispatch: PrefillDispatch,
    /// Prompts that may wait at the processor for prefill workers, per model; more are refused with 429. 0 refuses as soon
    /// as no worker has room. Default 8192: some minutes' work for eight workers. In a line that processors share (over NATS)
    /// each counts its own, until a worker has taken them.
    pub prefill_queue_limit: usize,
    /// Name of the field that carries a reasoning model's thoughts. Default `reasoning_content`.
    pub reasoning_field_name: ReasoningField,
    /// Whether requests may bring chat templates of their own. A template is bounded in time but not in
    /// memory. Default false: such requests get 400.
    pub trust_request_chat_template: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http_host: "127.0.0.1".to_owned(),
            http_port: 8000,
            system_host: "127.0.0.1".to_owned(),
            system_port: -1,
            tls_cert_path: None,
            tls_key_path: None,
            api_key: Vec::new(),
            api_key_file: None,
            metrics_auth: true,
            threads: 0,
            max_body_bytes: 64 << 20,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            drain_grace: Duration::from_secs(30),
            plane_token_file: None,
            plane_token: None,
            request_plane_tls: RequestPlaneTls::default(),
            request_plane_tls_name: None,
            namespace: None,
            discovery_backend: DiscoveryBackend::File,
            discovery_path: None,
            etcd: EtcdSettings::default(),
            kubernetes: KubernetesSettings::default(),
            nats: NatsSettings::default(),
            router_mode: RouterMode::RoundRobin,
            router_temperature: 0.0,
            router_decode_weight: DECODING,
            router_replica_sync: true,
            event_plane: EventPlane::Zmq,
            router_sync_host: "127.0.0.1".to_owned(),
            router_sync_port: 0,
            session_affinity: SessionAffinity::Header,
            request_timeout: None,
            conditional_disagg: None,
            disagg_min_prefill_tokens: None,
            disagg_max_prefill_queue: None,
            prefill_dispatch: PrefillDispatch::Push,
            prefill_queue_limit: 8192,
            reasoning_field_name: ReasoningField::ReasoningContent,
            trust_request_chat_template: false,
        }
    }
}

/// How it is decided whether a decode worker computes a prompt itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ConditionalMode {
    /// It never does.
    Off,
    /// By fixed numbers.
    Fixed,
    /// From measured speeds and the load of the moment.
    Auto,
}

/// What makes requests a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SessionAffinity {
    /// Nothing.
    Off,
    /// The header `x-stator-session`.
    Header,
    /// That header, or else the body's `user`.
    User,
}

/// How long a session keeps its worker.
const SESSION_TTL: Duration = Duration::from_secs(600);

impl Config {
    /// Returns how workers are chosen.
    pub fn routing(&self) -> Routing {
        Routing {
            mode: self.router_mode,
            temperature: self.router_temperature,
            decode_weight: self.router_decode_weight,
            session_ttl: match self.session_affinity {
                SessionAffinity::Off => Duration::ZERO,
                SessionAffinity::Header | SessionAffinity::User => SESSION_TTL,
            },
        }
    }

    /// Returns how prompts come to prefill workers.
    pub fn rules(&self) -> Rules {
        Rules {
            conditional: self.conditional(),
            dispatch: self.prefill_dispatch,
            most_waiting: self.prefill_queue_limit,
        }
    }

    /// Returns when decode workers compute prompts themselves.
    pub fn conditional(&self) -> Conditional {
        let numbers =
            self.disagg_min_prefill_tokens.is_some() || self.disagg_max_prefill_queue.is_some();
        match self.conditional_disagg {
            Some(ConditionalMode::Auto) => Conditional::Auto,
            Some(ConditionalMode::Off) => Conditional::Off,
            None if !numbers => Conditional::Off,
            Some(ConditionalMode::Fixed) | None => Conditional::Fixed(Bounds {
                min_prefill_tokens: self.disagg_min_prefill_tokens.unwrap_or(0),
                max_prefill_queue: self.disagg_max_prefill_queue,
            }),
        }
    }
}

/// The name of the field that carries a reasoning model's thoughts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ReasoningField {
    /// DeepSeek's name, which most clients know.
    ReasoningContent,
    /// The name that vLLM writes since 0.11.
    Reasoning,
}

impl ReasoningField {
    /// Returns the name as it stands in an answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReasoningContent => "reasoning_content",
            Self::Reasoning => "reasoning",
        }
    }
}
