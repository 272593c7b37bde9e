//! Why an engine did not start, and why it did not take something.

use std::{io, path::PathBuf, time::Duration};

use zeromq::ZmqError;

use crate::{
    introspect::IntrospectError, schema::SchemaError, sockets::Unsent, state::DeadReason,
    validate::Invalid, wire::WireError,
};

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{} is in use by another worker", path.display())]
    RunDirInUse { path: PathBuf },
    #[error("{}: {source}", path.display())]
    RunDir { path: PathBuf, source: io::Error },
    /// It may hold its devices still, so a second one is not started beside it.
    #[error(
        "{} says which engine was left running here, but cannot be read: end that engine if it runs, \
         remove the file, and start again",
        path.display()
    )]
    Record { path: PathBuf },
    #[error("the engine of before, process {pid}, cannot be ended: {source}")]
    Kept { pid: i32, source: io::Error },
    #[error("cannot start {}: {source}", python.display())]
    Spawn { python: PathBuf, source: io::Error },
    #[error("cannot listen for the engine on {address}: {source}")]
    Listen { address: String, source: ZmqError },
    #[error("`{bind}` is a wildcard; say under which host the engine reaches this machine")]
    NoAdvertisedHost { bind: String },
    #[error("`{0}` is not an address such as 127.0.0.1:29550")]
    BadAddress(String),
    #[error("the installed vLLM cannot be read: {0}")]
    Introspect(#[from] IntrospectError),
    #[error(transparent)]
    Version(#[from] SchemaError),
    #[error("the engine did not become ready within {} s", waited.as_secs())]
    TimedOut { waited: Duration },
    #[error(transparent)]
    Died(DeadReason),
    #[error("the engine's ready response cannot be read: {0}")]
    ReadyResponse(WireError),
    #[error("the engine's ready response lacks `{0}`")]
    ReadyLacks(&'static str),
    #[error(
        "the number of tokens of model `{model}` is not known: no readable config.json with a `vocab_size`"
    )]
    NoVocabSize { model: String },
    #[error("the engine cannot load the LoRA adapter `{name}` from {path}: {source}")]
    Adapter {
        name: String,
        path: String,
        source: UtilityError,
    },
    /// The worker's other engines, and what processors know of it, are of the files of before.
    #[error(
        "the files of the LoRA adapter `{name}` in {path} are not those of when the worker started: start the worker \
         again to serve what is there now"
    )]
    AdapterChanged { name: String, path: String },
    #[error("the files of the LoRA adapter `{name}` in {path} cannot be read: {source}")]
    AdapterFiles {
        name: String,
        path: String,
        source: io::Error,
    },
}

/// Why a request was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The request must not reach the engine; the client has to change it.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The engine cannot be reached; another one can be tried.
    #[error(transparent)]
    Unsent(#[from] Unsent),
    /// The engine is dead; another one can be tried.
    #[error("the engine is dead")]
    Dead,
}

/// Why a utility call has no result.
#[derive(Debug, thiserror::Error)]
pub enum UtilityError {
    #[error(transparent)]
    Unsent(#[from] Unsent),
    #[error("the engine is dead")]
    Dead,
    /// The engine's own words.
    #[error("{method}: {message}")]
    Failed { method: String, message: String },
}
