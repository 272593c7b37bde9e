//! Text in, tokens out, and back: pure functions and state machines, no I/O, no clock, no tokio.
//!
//! A request passes through [`template`] (messages to prompt text) and [`Tokenizer`] (text to ids); its
//! answer passes through [`OutputText`] (ids to text, stop strings), [`LogprobTexts`] (the text of
//! single tokens), [`reasoning`] and [`tools`] (what the text means). What vLLM's own front end answers
//! is the measure: where Hugging Face or vLLM decide something, this crate decides the same, and says
//! where it does not.

mod detokenizer;
mod encoder;
mod files;
mod load;
mod logprobs;
mod markers;
mod segments;
mod stop;
mod tokenizer;
mod vocab;

pub mod python_json;
pub mod reasoning;
pub mod template;
pub mod tools;

pub use detokenizer::{DetokenizeOptions, Detokenizer};
pub use encoder::NotFaster;
pub use files::{ModelFiles, SpecialTokens};
pub use logprobs::LogprobTexts;
pub use segments::SegmentCache;
pub use stop::{BadStopString, End, OutputText, Pushed, StopStrings};
pub use tokenizer::{LoadError, Tokenizer, TokenizerError};
