//! Why a configuration is refused, with the flag that works.

use stator_common::{
    card::{BadEndpoint, Role},
    settings::{FileError, NatsSettingsError, SecretError},
};
use stator_engine::{
    handoff::{ShortName, TransferError},
    introspect::IntrospectError,
    kv_events,
};

use crate::{adapters::AdapterError, python::PythonError};

/// Why the configuration could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("from the environment: {0}")]
    Environment(clap::Error),
    #[error("{0}")]
    Value(Box<toml::de::Error>),
    #[error(transparent)]
    Endpoint(#[from] BadEndpoint),
    #[error("settings cannot be merged: {0}")]
    Merge(Box<toml::ser::Error>),
    #[error("which model? Name a folder or a Hugging Face id as the first argument")]
    NoModel,
    #[error("'{0}' is no name for a place: letters, digits, '-' and '_' only")]
    Name(String),
    #[error("--engine {0} and --engine-attach contradict each other")]
    Attach(&'static str),
    #[error(
        "--engine-keep is not for the data-parallel ranks of a mixture of experts: they end with the worker that \
         coordinates them"
    )]
    KeepLockstep,
    #[error(
        "how the data-parallel ranks of '{model}' run depends on whether it is a mixture of experts, and its \
         files are not here: name the model's folder, or fetch it first (hf download {model}); {source}"
    )]
    Experts {
        model: String,
        source: IntrospectError,
    },
    #[error("--engine attach needs --engine-attach tcp://host:port")]
    NoAttach,
    #[error(transparent)]
    Token(#[from] SecretError),
    #[error(
        "--host {0} is open to other machines: name a secret with --plane-token-file (or STATOR_PLANE_TOKEN), \
         give processors certificates and say --request-plane-tls-ca, or say --insecure-plane"
    )]
    OpenPlane(String),
    #[error(transparent)]
    Python(#[from] PythonError),
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(
        "a {role} worker needs a connector that hands KV from engine to engine{}: say {}",
        has(.found), remedy(.names)
    )]
    NoHandOff {
        role: Role,
        /// vLLM's names of what there is instead.
        found: Vec<String>,
        names: Vec<ShortName>,
    },
    #[error("{flag} means a {meant} worker, and this is stator-{role}: run stator-{meant}")]
    OtherRole {
        flag: &'static str,
        meant: Role,
        role: Role,
    },
    #[error("{0} means an encode worker, which this version does not have")]
    NoEncode(&'static str),
    #[error(transparent)]
    Nats(#[from] NatsSettingsError),
    #[error(
        "the NATS server at {0} may be open to whoever reaches it: log in (--nats-username, --nats-token-file, \
         --nats-credentials-file, ..), or name a secret with --plane-token-file (or STATOR_PLANE_TOKEN), \
         or say --insecure-plane"
    )]
    OpenNats(String),
    #[error(
        "--request-plane-tls-* are for listeners of this worker, and with --request-plane nats it has none: \
         TLS is with the server (tls://host:port, --nats-tls-ca-cert-path)"
    )]
    TlsOverNats,
    #[error(
        "--request-plane-tls-ca asks processors for a certificate, which needs TLS: give \
         --request-plane-tls-cert and --request-plane-tls-key, too"
    )]
    ClientsWithoutTls,
    #[error(transparent)]
    Adapters(#[from] AdapterError),
    #[error(transparent)]
    KvEvents(#[from] kv_events::ConfigError),
    #[error("--kv-relay needs the engines' KV events, and --kv-events-config {0}")]
    Unheard(&'static str),
    #[error(
        "--kv-relay-port {0}: with --event-plane nats the relay in this worker listens at no port: leave it out, or say \
         --event-plane zmq"
    )]
    RelayPortOverNats(u16),
    #[error("--kv-relay-address '{0}' is not an address: expected host:port")]
    RelayAddress(String),
    #[error("--headless is a further node of an engine: {0}")]
    Headless(&'static str),
    #[error(
        "--connector {} and --kv-transfer-config contradict each other: leave out one of them{}",
        list(.names), stands_for(.meaning)
    )]
    TwoConnectors {
        names: Vec<ShortName>,
        meaning: Option<String>,
    },
    #[error(
        "--connector {} contradicts itself: say --connector none, or leave `none` out",
        list(.0)
    )]
    NoneAndOthers(Vec<ShortName>),
}

fn list(names: &[ShortName]) -> String {
    let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
    names.join(",")
}

fn has(found: &[String]) -> String {
    match found {
        [] => String::new(),
        found => format!(", and {} does not", found.join(" with ")),
    }
}

fn remedy(names: &[ShortName]) -> String {
    let others = names.iter().filter(|name| **name != ShortName::None);
    let names: Vec<ShortName> = others.copied().chain([ShortName::Nixl]).collect();
    format!("--connector {}", list(&names))
}

fn stands_for(meaning: &Option<String>) -> String {
    meaning.as_ref().map_or_else(String::new, |json| {
        format!(" (--connector stands for --kv-transfer-config '{json}')")
    })
}
