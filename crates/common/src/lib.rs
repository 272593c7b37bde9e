//! What every Stator process needs and none owns: the messages that travel between processes
//! and the glue that carries them.
//!
//! Each module answers one question: [`code`] why something was refused, [`ids`] what things are
//! called, [`proto`] what processes say to each other. It knows neither vLLM nor the OpenAI API.

pub mod code;
pub mod ids;
pub mod proto;

pub use code::Code;
pub use ids::{BlobHash, RequestId, WorkerId};
