//! Who gets the outputs.

use crate::output::{Output, SchedulerStats};

/// What one engine step brought.
#[derive(Debug)]
pub struct Step {
    /// At most one per live request. The last one of a request has a `finish`, and each request gets
    /// exactly one such, unless its handle is dropped before.
    pub outputs: Vec<Output>,
    /// The scheduler after this step; absent if the engine runs with `--disable-log-stats`.
    pub stats: Option<SchedulerStats>,
}

/// Takes the outputs of an engine.
///
/// Called from the one task that receives from the engine, as soon as a step has arrived, without a
/// queue or a wake-up in between: what takes long here holds up every stream.
pub trait StepSink: Send + 'static {
    /// Takes what one step brought.
    fn step(&mut self, step: Step);
}

impl<F: FnMut(Step) + Send + 'static> StepSink for F {
    fn step(&mut self, step: Step) {
        self(step);
    }
}
