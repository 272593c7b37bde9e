//! A simulated engine that speaks the wire of vLLM's EngineCore.
//!
//! It is started like a headless vLLM and cannot be told from one by a frontend: handshake, ADD,
//! ABORT and UTILITY over ZMQ, batched outputs, KV events with replay, KV hand-off parameters. So
//! tests and benchmarks of the serving layer run the code that production runs. It is as
//! fragile as the real one, too: what kills or deafens an engine does so here.
//!
//! - [`cache`], [`scheduler`], [`model`]: pure; no clock, no I/O.
//! - [`wire`]: bytes to requests, outputs to bytes. It shares nothing with the engine client's
//!   codec on purpose.
//! - [`engine`]: the loop that joins them in (tokio) time.
//! - [`link`], [`publisher`], [`transfer`]: the sockets.
//!
//! [`Sim::spawn`] starts one in this process, `stator-sim` is the same as a program.

pub mod cache;
pub mod cli;
pub mod config;
pub mod engine;
pub mod link;
pub mod model;
pub mod publisher;
pub mod request;
pub mod scheduler;
pub mod sim;
pub mod transfer;
pub mod utilities;
pub mod wire;

pub use config::{Config, Faults, KvEvents, ModelFolder, Timing};
pub use sim::{Exit, Handle, Sim, SimError};
