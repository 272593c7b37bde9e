//! One vLLM engine, driven from Rust: the only crate that knows vLLM (its wire, its Python, its flags).

mod adopt;
pub mod config;
mod connected;
mod engine;
mod error;
pub mod flags;
mod guard;
mod handshake;
mod info;
pub mod introspect;
mod limits;
mod live;
mod local;
mod logtail;
pub mod model;
pub mod output;
mod process;
mod progress;
mod receive;
pub mod request;
mod rundir;
pub mod schema;
mod sink;
mod sockets;
mod spawn;
mod start;
mod state;
mod supervise;
mod utilities;
pub mod validate;
pub mod wire;

pub use config::{Attach, Config, Launch, Simulate, Spawn, Waits};
pub use engine::{Engine, Prepared, RequestHandle};
pub use error::{StartError, SubmitError, UtilityError};
pub use info::EngineInfo;
pub use output::{
    Batch, Finish, Logprobs, Message, Output, RequestError, RequestKey, SchedulerStats,
    UtilityOutput,
};
pub use request::{Constraint, Lora, Request, Sampling, StructuredOutputs, Tokens};
pub use sink::{Step, StepSink};
pub use sockets::Unsent;
pub use state::{DeadReason, Phase, State};
