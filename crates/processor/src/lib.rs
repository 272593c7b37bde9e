//! The processor: the OpenAI-compatible front of Stator.
//!
//! The source follows a request's way: [`server`] accepts it, [`openai`] reads and validates it,
//! `generate` renders, tokenizes and answers, [`models`] says what is served, [`fleet`] knows which workers a
//! request needs, [`pool`] sends it to one and hands back what that one says; what their caches hold is
//! `knowledge`, what other processors do there is [`peers`]. [`config`] and [`metrics`] belong to all of them.

pub mod config;
pub mod fleet;
mod generate;
mod knowledge;
pub mod metrics;
pub mod models;
pub mod openai;
pub mod peers;
pub mod pool;
pub mod server;
mod tokenize;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use stator_common::drain::Drain;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::openai::prompt::LongWork;
use crate::server::{HttpCounters, Keys};

pub use server::{BindError, Processor};

/// What every request handler may use: axum's state is an `Arc` of it.
pub struct App {
    /// The configuration.
    pub config: Arc<Config>,
    /// What is served.
    pub models: Arc<Models>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// When to stop.
    pub drain: Drain,
    /// Other processors that are heard.
    pub(crate) peers: Arc<AtomicUsize>,
    pub(crate) keys: Keys,
    pub(crate) http: HttpCounters,
    pub(crate) long_work: LongWork,
}

impl App {
    /// Puts together what handlers use.
    pub fn new(
        config: Arc<Config>,
        models: Arc<Models>,
        metrics: Arc<Metrics>,
        drain: Drain,
    ) -> Self {
        let keys = Keys::new(&config);
        let http = HttpCounters::new(Arc::clone(&metrics));
        Self {
            config,
            models,
            metrics,
            drain,
            peers: Arc::default(),
            keys,
            http,
            long_work: LongWork::default(),
        }
    }
}
