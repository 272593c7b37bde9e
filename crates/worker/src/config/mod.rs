//! What can be set on a worker.

mod check;
mod error;
mod load;

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use stator_common::card::{Endpoint, Role};
pub use stator_common::settings::{
    EtcdSettings, KubernetesSettings, NatsSettings, RequestPlaneTls, Secret,
};

use stator_engine::{
    handoff::{HandOff, ShortName, TransferConfig},
    introspect::Installed,
    kv_events::Publisher,
};

pub use error::ConfigError;
pub use load::{load, to_toml};

use crate::cli::{DiscoveryBackend, EngineKind, EventPlane, KvRelay, Mode, RequestPlane};

/// A worker's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Model folder or Hugging Face id. Must be set.
    pub model: String,
    /// Names that clients may use; the first is the model's id. Empty: `model`.
    pub served_model_name: Vec<String>,
    /// Jinja file (or, with a `{` in it, the template itself) in place of the model's chat template.
    pub chat_template: Option<String>,
    /// Finds tool calls in the output. Absent: tools are not parsed.
    pub tool_call_parser: Option<String>,
    /// Tells thoughts from answers; goes to the engine too. Absent: no reasoning.
    pub reasoning_parser: Option<String>,
    /// The same, for the output alone; wins over `reasoning_parser` there.
    pub dyn_reasoning_parser: Option<String>,
    /// Without effect; accepted because vLLM has it.
    pub enable_auto_tool_choice: bool,

    /// Keeps deployments apart. Default `dynamo`, as Dynamo's.
    pub namespace: String,
    /// Kind of worker. Absent: by role (`backend` for aggregated and decode workers).
    pub component_name: Option<String>,
    /// Function of the worker. Default `generate`.
    pub endpoint_name: String,
    /// What kind of worker this is meant to be. Absent: what it is.
    pub disaggregation_mode: Option<Mode>,
    /// The same, in an older spelling.
    pub is_prefill_worker: bool,
    /// The same, in an older spelling.
    pub is_decode_worker: bool,
    /// Where the worker makes itself known. Default `file`.
    pub discovery_backend: DiscoveryBackend,
    /// Folder of the file discovery. Absent: the default that processors use too.
    pub discovery_path: Option<PathBuf>,
    /// How etcd is reached.
    #[serde(skip_serializing_if = "EtcdSettings::is_empty")]
    pub etcd: EtcdSettings,
    /// How Kubernetes is reached, and which pod this is.
    #[serde(skip_serializing_if = "KubernetesSettings::is_empty")]
    pub kubernetes: KubernetesSettings,
    /// How the NATS server is reached.
    #[serde(skip_serializing_if = "NatsSettings::is_empty")]
    pub nats: NatsSettings,

    /// How requests come. Default `tcp`.
    pub request_plane: RequestPlane,
    /// Its certificates. Empty, the default: nothing is encrypted.
    #[serde(skip_serializing_if = "RequestPlaneTls::is_empty")]
    pub request_plane_tls: RequestPlaneTls,
    /// How events about KV go. Default `zmq`.
    pub event_plane: EventPlane,
    /// Who tells processors what the engines cache. Default `off`.
    pub kv_relay: KvRelay,
    /// Where processors reach the relay of this machine, `host:port`. Absent: this worker's host and the port that
    /// relays have by default.
    pub kv_relay_address: Option<String>,
    /// Port of the relay in this worker; questions come on the next one. 0, the default, takes two free ones.
    pub kv_relay_port: u16,
    /// Whether engines publish KV events though no relay listens. Default false.
    pub enable_kv_events: bool,
    /// The same as `event_plane`, in Dynamo's words. Default `zmq`.
    pub kv_events_publisher_type: EventPlane,
    /// First port of the engines' KV events. Absent: they publish into files of their folders.
    pub kv_event_port: Option<u16>,
    /// Address to take requests on. Default 127.0.0.1: this machine only.
    pub host: String,
    /// Port to take requests on. 0, the default, takes a free one.
    pub port: u16,
    /// Host under which processors reach this worker. Absent: `host`, or this machine's address if
    /// that is a wildcard.
    pub advertise_host: Option<String>,
    /// File with the secret that processors must present. Absent: none is asked for.
    pub plane_token_file: Option<PathBuf>,
    /// Whether a listener beyond loopback may go without a secret. Default false.
    pub insecure_plane: bool,
    /// Address of the system routes. Default 127.0.0.1.
    pub system_host: String,
    /// Port of the system routes; 0 takes a free one, -1 (the default) means none.
    pub system_port: i32,

    /// What computes. Absent: `attach` if `engine_attach` is set, else `vllm`.
    pub engine: Option<EngineKind>,
    /// Where the handshake of an engine that is started elsewhere arrives, `tcp://host:port`.
    pub engine_attach: Option<String>,
    /// Host under which such an engine reaches this worker. Absent: the host of `engine_attach`.
    pub engine_advertise_host: Option<String>,
    /// The simulated engine's program. Absent: `stator-sim` beside this one, or on the path.
    pub engine_command: Option<PathBuf>,
    /// What moves KV in and out of the engine; stands for `--kv-transfer-config`. Empty: what that says, if
    /// anything.
    pub connector: Vec<ShortName>,
    /// Python with vLLM. Absent: that of `VLLM_VENV`, `VIRTUAL_ENV`, `./.venv`, or `python3`.
    pub python: Option<PathBuf>,
    /// Whether the engine outlives this worker, to be taken over by the next one. Default false.
    pub engine_keep: bool,
    /// The engine's folder. Absent: one below the temporary folder, by namespace, component and
    /// model if the engine is kept, else this worker's own.
    pub run_dir: Option<PathBuf>,
    /// Independent engines of this worker. Default 1.
    pub data_parallel_size: u32,
    /// Whether those engines may share GPUs. Default false.
    pub share_gpus: bool,
    /// Whether this is only a further node of an engine. Default false.
    pub headless: bool,
    /// Whether a vLLM outside the tested versions is accepted. Default false.
    pub any_vllm_version: bool,
    /// Time for an engine to become ready. Default 10 min, vLLM's own.
    #[serde(with = "humantime_serde")]
    pub engine_ready_timeout: Duration,
    /// vLLM's flags, verbatim.
    pub engine_args: Vec<String>,

    /// Time that running requests get to finish after SIGTERM. Default 30 s; zero cuts them off.
    #[serde(with = "humantime_serde")]
    pub drain_grace: Duration,

    /// The secret itself, once it is read. Never written.
    #[serde(skip)]
    pub plane_token: Option<Secret>,
    /// Experts of a layer, of a model that is not on this machine and whose ranks it decides about.
    #[serde(skip)]
    pub experts: Option<u32>,
    /// The vLLM that will run, once it has been looked at.
    #[serde(skip)]
    pub vllm: Option<Arc<Installed>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model: String::new(),
            served_model_name: Vec::new(),
            chat_template: None,
            tool_call_parser: None,
            reasoning_parser: None,
            dyn_reasoning_parser: None,
            enable_auto_tool_choice: false,
            namespace: "dynamo".to_owned(),
            component_name: None,
            endpoint_name: "generate".to_owned(),
            disaggregation_mode: None,
            is_prefill_worker: false,
            is_decode_worker: false,
            discovery_backend: DiscoveryBackend::File,
            discovery_path: None,
            etcd: EtcdSettings::default(),
            kubernetes: KubernetesSettings::default(),
            nats: NatsSettings::default(),
            request_plane: RequestPlane::Tcp,
            request_plane_tls: RequestPlaneTls::default(),
            event_plane: EventPlane::Zmq,
            kv_relay: KvRelay::Off,
            kv_relay_address: None,
            kv_relay_port: 0,
            enable_kv_events: false,
            kv_events_publisher_type: EventPlane::Zmq,
            kv_event_port: None,
            host: "127.0.0.1".to_owned(),
            port: 0,
            advertise_host: None,
            plane_token_file: None,
            insecure_plane: false,
            system_host: "127.0.0.1".to_owned(),
            system_port: -1,
            engine: None,
            engine_attach: None,
            engine_advertise_host: None,
            engine_command: None,
            connector: Vec::new(),
            python: None,
            engine_keep: false,
            run_dir: None,
            data_parallel_size: 1,
            share_gpus: false,
            headless: false,
            any_vllm_version: false,
            engine_ready_timeout: Duration::from_secs(600),
            engine_args: Vec::new(),
            drain_grace: Duration::from_secs(30),
            plane_token: None,
            experts: None,
            vllm: None,
        }
    }
}

impl Config {
    /// Returns what computes.
    pub fn engine_kind(&self) -> EngineKind {
        match (self.engine, &self.engine_attach) {
            (Some(kind), _) => kind,
            (None, Some(_)) => EngineKind::Attach,
            (None, None) => EngineKind::Vllm,
        }
    }

    /// Returns how the engines hand KV on; `None` for a role that does not.
    ///
    /// # Errors
    /// [`ConfigError::Transfer`], and [`ConfigError::NoHandOff`] for a role that cannot do without.
    pub fn handoff(&self, role: Role) -> Result<Option<HandOff>, ConfigError> {
        match role {
            Role::Agg | Role::Encode => return Ok(None),
            Role::Prefill | Role::Decode => {}
        }
        let transfer = self.transfer(role)?;
        let handoff = transfer.as_ref().and_then(TransferConfig::handoff);
        handoff.map(Some).ok_or_else(|| {
            let found = transfer.map_or_else(Vec::new, |transfer| {
                transfer
                    .connectors()
                    .into_iter()
                    .map(str::to_owned)
                    .collect()
            });
            ConfigError::NoHandOff {
                role,
                found,
                names: self.connector.clone(),
            }
        })
    }

    /// Returns the engine's connectors, where it has some.
    ///
    /// # Errors
    /// [`ConfigError::Transfer`], [`ConfigError::TwoConnectors`] and [`ConfigError::NoneAndOthers`].
    pub fn transfer(&self, role: Role) -> Result<Option<TransferConfig>, ConfigError> {
        let given = TransferConfig::given(&self.engine_args)?;
        if self.connector.is_empty() {
            return Ok(given);
        }
        if self.connector.len() > 1 && self.connector.contains(&ShortName::None) {
            return Err(ConfigError::NoneAndOthers(self.connector.clone()));
        }
        let cpu = self.vllm.as_ref().is_some_and(|vllm| vllm.is_cpu());
        let named = TransferConfig::of_names(&self.connector, role, cpu);
        if given.is_some() {
            return Err(ConfigError::TwoConnectors {
                names: self.connector.clone(),
                meaning: named.map(|named| named.to_json()),
            });
        }
        Ok(named)
    }

    /// Returns what vLLM's own flag says of KV events, if it is given.
    ///
    /// # Errors
    /// [`ConfigError::KvEvents`] and [`ConfigError::Unheard`].
    pub fn kv_events(&self) -> Result<Option<Publisher>, ConfigError> {
        let given = Publisher::given(&self.engine_args)?;
        let why = match &given {
            _ if self.kv_relay == KvRelay::Off => None,
            Some(given) if !given.publishes() => Some("switches them off"),
            Some(given) if !given.binds() => Some(
                "names an endpoint that the engine would dial: say tcp://*:PORT, or leave the flag out",
            ),
            Some(_) | None => None,
        };
        match why {
            Some(why) => Err(ConfigError::Unheard(why)),
            None => Ok(given),
        }
    }

    /// Returns where the worker belongs.
    pub fn place(&self, role: Role) -> Endpoint {
        Endpoint {
            namespace: self.namespace.clone(),
            component: self.component_name.clone().unwrap_or_else(|| {
                // Dynamo's names, which dashboards and scripts know.
                match role {
                    Role::Agg | Role::Decode => "backend",
                    Role::Prefill => "prefill",
                    Role::Encode => "encode",
                }
                .to_owned()
            }),
            endpoint: self.endpoint_name.clone(),
        }
    }

    /// Returns how news of KV caches goes: over NATS if either name of the setting says so.
    pub fn event_plane(&self) -> EventPlane {
        match (self.event_plane, self.kv_events_publisher_type) {
            (EventPlane::Zmq, EventPlane::Zmq) => EventPlane::Zmq,
            (EventPlane::Nats, _) | (_, EventPlane::Nats) => EventPlane::Nats,
        }
    }

    /// Says whether anything goes over a NATS server.
    pub fn uses_nats(&self) -> bool {
        self.request_plane == RequestPlane::Nats || self.event_plane() == EventPlane::Nats
    }

    /// Returns the names that clients may use, the id first.
    pub fn names(&self) -> Vec<String> {
        if self.served_model_name.is_empty() {
            vec![self.model.clone()]
        } else {
            self.served_model_name.clone()
        }
    }
}

/// An endpoint as it is written: `dyn://namespace.component.endpoint`.
pub(crate) mod as_text {
    use serde::Serializer;
    use stator_common::card::Endpoint;

    pub(crate) fn serialize<S: Serializer>(
        endpoint: &Option<Endpoint>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match endpoint {
            Some(endpoint) => serializer.collect_str(endpoint),
            None => serializer.serialize_none(),
        }
    }
}
