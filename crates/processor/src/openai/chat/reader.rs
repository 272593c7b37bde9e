//! What an answer's text means: thoughts, content, tool calls.

use super::listed::{self, Listed};
use super::tools::Calls;
use super::types::Tool;
use crate::models::Model;
use crate::openai::prompt::Prompt;

/// What a piece of text adds to a message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<CallDelta>,
}

impl Parsed {
    pub(super) fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }
}

/// What is added to one tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CallDelta {
    /// Which call of the message.
    pub(super) index: usize,
    /// On the first delta of a call.
    pub(super) name: Option<String>,
    /// JSON, or a part of it.
    pub(super) arguments: String,
}

/// Reads one choice's text, piece by piece.
pub(super) struct Reader {
    calls: CallReader,
}

enum CallReader {
    /// All text is content.
    None,
    /// All text is the arguments of one call.
    Named { name: String, announced: bool },
    /// All text is a JSON list of calls.
    Listed(Listed),
}

impl Reader {
    pub(super) fn new(_model: &Model, calls: &Calls, _tools: &[Tool], _prompt: &Prompt) -> Self {
        let calls = match calls {
            Calls::None | Calls::Parsed => CallReader::None,
            Calls::Named(name) => CallReader::Named {
                name: name.clone(),
                announced: false,
            },
            Calls::Listed => CallReader::Listed(Listed::default()),
        };
        Self { calls }
    }

    /// Says whether all text is content, so that nothing need be read.
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.calls, CallReader::None)
    }

    /// Says whether thoughts are looked for.
    pub(super) fn has_reasoning(&self) -> bool {
        false
    }

    /// Says whether one of the model's parsers reads the text.
    pub(super) fn has_parser(&self) -> bool {
        self.has_reasoning()
    }

    /// Reads a whole answer.
    pub(super) fn whole(mut self, text: &str) -> Parsed {
        match &self.calls {
            CallReader::None => self.push(text, true),
            CallReader::Named { .. } if text.trim().is_empty() => Parsed::default(),
            CallReader::Named { .. } => self.push(text, true),
            CallReader::Listed(_) => Parsed {
                calls: listed::whole(text),
                ..Parsed::default()
            },
        }
    }

    /// Reads on.
    ///
    /// - `finished`: nothing comes after `text`.
    pub(super) fn push(&mut self, text: &str, _finished: bool) -> Parsed {
        let mut parsed = Parsed::default();
        match &mut self.calls {
            CallReader::None => parsed.content.push_str(text),
            CallReader::Named { name, announced } => {
                let first = !std::mem::replace(announced, true);
                if first || !text.is_empty() {
                    let name = first.then(|| name.clone());
                    parsed.calls.push(CallDelta {
                        index: 0,
                        name,
                        arguments: text.to_owned(),
                    });
                }
            }
            CallReader::Listed(listed) => listed.push(text, &mut parsed.calls),
        }
        parsed
    }
}
