//! What all workers share: a configuration, engines under supervision, and a request plane in front
//! of them.
//!
//! The way of a request: `handler` takes it from the plane, `convert` makes it the engine's, `requests`
//! remembers whose it is, `sink` sends the outputs of each step back to where the requests came from. On both ways the
//! role's [`Plan`] says what this role makes of it.
//! Around it: `rank` keeps an engine running, `files` and `card` tell what is served, `adapters` what is served beside the model, `transfer` where engines find each other, `kv_events` who hears what they cache, `system` answers
//! questions of people and machines. A role (`stator-agg`) is a plan and a call of [`run()`].

mod adapters;
mod announce;
mod card;
pub mod cli;
pub mod config;
mod convert;
mod dump;
mod files;
mod handler;
mod headless;
mod kv_events;
mod launch;
mod line;
mod metrics;
mod network;
pub mod plan;
mod plane;
pub mod preflight;
mod publication;
mod python;
mod rank;
mod requests;
mod run;
mod sink;
mod status;
mod system;
mod transfer;
mod worker;

pub use config::Config;
pub use plan::Plan;
pub use run::run;
pub use worker::Worker;
