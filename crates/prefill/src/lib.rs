//! The prefill role: what `stator-prefill` does to a request.

mod plan;

pub use plan::Prefill;
