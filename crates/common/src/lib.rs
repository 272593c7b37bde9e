//! What every Stator process needs and none owns: the messages that travel between processes
//! and the glue that carries them.
//!
//! Each module answers one question: [`code`] why something was refused, [`ids`] what things are
//! called, [`proto`] what processes say to each other, [`card`] what a worker is, [`discovery`]
//! which workers there are, [`plane`] how requests reach them, [`events`] how news spreads, [`nats`] how a NATS server is
//! reached that may carry both, [`process`] whether a process is still the same, [`drain`] when to stop,
//! [`scratch`] where temporary files go, [`settings`] what every role lets a person set, [`telemetry`] what is
//! going on, [`tickets`] whose prompt is next where processors share a line, [`tls`] how certificates are used. It knows neither vLLM nor the OpenAI API.

pub mod card;
mod causes;
pub mod code;
pub mod discovery;
pub mod drain;
pub mod events;
pub mod ids;
pub mod nats;
pub mod plane;
pub mod process;
pub mod proto;
pub mod scratch;
pub mod settings;
pub mod telemetry;
pub mod tickets;
pub mod tls;

pub use card::Card;
pub use code::Code;
pub use ids::{BlobHash, RequestId, WorkerId};
