//! One vLLM engine, driven from Rust: the only crate that knows vLLM (its wire, its Python, its flags).
//!
//! [`Engine::start`] spawns a headless vLLM, awaits one that somebody else starts, or adopts one that
//! an earlier worker left running. Requests go in by [`Engine::submit`], which refuses whatever the
//! engine would not survive; outputs come out at a [`StepSink`], one call per engine step, from the
//! one task that receives them. Dropping a [`RequestHandle`] aborts its request. [`Engine::state`]
//! tells when the engine is gone, and then each request that ran has got its one error; to go on,
//! start again. The data-parallel ranks of a model are so many engines, each with a
//! [`Config::run_dir`] of its own; those of a mixture of experts share a [`Lockstep`].
//!
//! The path of a request: `validate` checks it, `wire` writes it, `live` sends it and remembers it;
//! `receive` reads the outputs by `wire` and looks their requests up in `live`. The life of an engine:
//! `start` calls `spawn` and `handshake`, or `adopt`; `connected` makes it run; `supervise` watches it
//! (`process`, `guard`, `logtail`) and clears away what is left. [`kv_events`] stands beside that: what an engine tells
//! of its cache is heard by whoever wants to, in this process or another.

pub mod adapter;
mod adopt;
pub mod config;
mod connected;
mod engine;
mod error;
pub mod flags;
mod grammar_log;
mod guard;
pub mod handoff;
mod handshake;
mod info;
pub mod introspect;
pub mod kv_events;
mod left;
mod limits;
mod live;
mod local;
mod lockstep;
mod logtail;
pub mod model;
mod node;
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

pub use adapter::Adapter;
pub use config::{Attach, Config, Launch, Simulate, Spawn, Waits};
pub use engine::{Engine, Prepared, RequestHandle};
pub use error::{StartError, SubmitError, UtilityError};
pub use handoff::HandOff;
pub use info::EngineInfo;
pub use left::end_left;
pub use lockstep::Lockstep;
pub use node::Node;
pub use output::{
    Batch, Finish, Logprobs, Message, Output, RequestError, RequestKey, SchedulerStats,
    UtilityOutput,
};
pub use request::{Constraint, Lora, Request, Sampling, StructuredOutputs, Tokens};
pub use sink::{Step, StepSink};
pub use sockets::Unsent;
pub use state::{DeadReason, Phase, State};
