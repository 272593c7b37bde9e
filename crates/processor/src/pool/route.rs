//! What a request itself says about where it goes.

use std::sync::Arc;

use parking_lot::Mutex;
use stator_common::WorkerId;

use super::{RouterMode, Routing};

/// What a request itself says about where it goes.
#[derive(Debug, Default)]
pub(crate) struct Route {
    /// The worker that answers.
    pub(crate) worker: Option<WorkerId>,
    /// The worker that computes the prompt, where that is another.
    pub(crate) prefill_worker: Option<WorkerId>,
    /// Hash of the session's name.
    pub(crate) session: Option<u64>,
    pub(crate) mode: Option<RouterMode>,
    pub(crate) temperature: Option<f64>,
    pub(crate) decode_weight: Option<f64>,
    /// Collects why workers were chosen, where somebody wants to know.
    pub(crate) told: Option<Arc<Mutex<Vec<String>>>>,
}

impl Route {
    /// Returns the rules for this request.
    ///
    /// - `routing`: for those that say nothing.
    pub(crate) fn over(&self, routing: &Routing) -> Routing {
        Routing {
            mode: self.mode.unwrap_or(routing.mode),
            temperature: self.temperature.unwrap_or(routing.temperature),
            decode_weight: self.decode_weight.unwrap_or(routing.decode_weight),
            session_ttl: routing.session_ttl,
        }
    }

    /// Notes why a worker was chosen.
    pub(crate) fn tell(&self, reason: impl FnOnce() -> String) {
        if let Some(told) = &self.told {
            told.lock().push(reason());
        }
    }
}
