//! The aggregated role: what `stator-agg` does to a request.

mod plan;

pub use plan::Agg;
