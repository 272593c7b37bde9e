//! One vLLM engine, driven from Rust: the only crate that knows vLLM (its wire, its Python, its flags).

pub mod output;
pub mod request;

pub use output::{
    Batch, Finish, Logprobs, Message, Output, RequestError, RequestKey, SchedulerStats,
    UtilityOutput,
};
pub use request::{Constraint, Lora, Request, Sampling, StructuredOutputs, Tokens};
