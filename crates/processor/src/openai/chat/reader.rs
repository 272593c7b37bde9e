//! What an answer's text means: thoughts, content, tool calls.

use serde_json::Value;
use stator_common::Code;
use stator_text::reasoning::{Reasoned, ReasoningParser};
use stator_text::tools::{ToolCallDelta, ToolParser};

use super::listed::{self, Listed};
use super::tools::Calls;
use crate::models::Model;
use crate::openai::error::ApiError;

/// What a piece of text adds to a message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) reasoning: String,
    pub(super) content: String,
    pub(super) calls: Vec<CallDelta>,
}

/// What is added to one tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CallDelta {
    /// Which call of the message.
    pub(super) index: usize,
    /// On the first delta of a call: its id, where it has one already, and its name.
    pub(super) id: Option<String>,
    pub(super) name: Option<String>,
    /// JSON, or a part of it; `None` where only the name is known yet.
    pub(super) arguments: Option<String>,
}

/// What a request says about thinking, as far as it matters to reading the answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thinking<'a> {
    /// The rendered prompt; its end tells whether the model is thinking already.
    pub(super) prompt: &'a str,
    /// Whether the request asks the model to think.
    pub(super) wanted: Option<bool>,
}

/// Reads one choice's text, piece by piece.
pub(super) struct Reader {
    reasoning: Option<ReasoningParser>,
    calls: CallReader,
    thoughts: Thoughts,
    /// The model is served with a parser, whether this answer needs it or not.
    has_parser: bool,
}

/// Counts the tokens that are thoughts.
#[derive(Debug, Default)]
struct Thoughts {
    count: usize,
    thinking: bool,
    /// The tokens before and after thoughts, where the format has such tokens.
    markers: Option<(Option<u32>, u32)>,
}

impl Thoughts {
    fn new(parser: &ReasoningParser, model: &Model) -> Self {
        let id = |marker| model.assets.tokenizer.token_id(marker);
        let markers = parser
            .markers()
            .and_then(|(start, end)| Some((id(start), id(end)?)));
        Self {
            count: 0,
            thinking: parser.is_in_reasoning(),
            markers,
        }
    }

    /// Counts tokens; a marker is no thought.
    ///
    /// - `thinking`: whether the parser is among thoughts after them.
    fn push(&mut self, tokens: &[u32], thinking: bool) {
        let Some((start, end)) = self.markers else {
            self.count += if self.thinking && thinking {
                tokens.len()
            } else {
                0
            };
            self.thinking = thinking;
            return;
        };
        for &token in tokens {
            if token == end {
                self.thinking = false;
            } else if Some(token) == start {
                self.thinking = true;
            } else {
                self.count += usize::from(self.thinking);
            }
        }
    }
}

enum CallReader {
    /// All text is content.
    None,
    /// The model's tool parser finds the calls.
    Parsed(Box<ToolParser>),
    /// All text is the arguments of one call.
    Named { name: String, announced: bool },
    /// All text is a JSON list of calls, with the arguments under this key.
    Listed(Box<Listed>, &'static str),
}

impl Reader {
    /// Returns the reader of one choice.
    ///
    /// - `tools`: as the request sent them.
    ///
    /// # Errors
    /// The model is served with a parser that is not known here, or a tool is not one.
    pub(super) fn new(
        model: &Model,
        calls: &Calls,
        tools: &[Value],
        thinking: Thinking<'_>,
    ) -> Result<Self, ApiError> {
        let misconfigured = |error: String| ApiError::new(Code::Internal, error);
        let reasoning = model.card.reasoning_parser.as_deref().map(|name| {
            ReasoningParser::new(name, thinking.prompt, thinking.wanted)
                .map_err(|error| misconfigured(error.to_string()))
        });
        let calls = match (calls, model.card.tool_call_parser.as_deref()) {
            (Calls::Parsed, Some(name)) => {
                let parser = ToolParser::new(name, tools);
                let parser = parser.map_err(|error| misconfigured(error.to_string()))?;
                CallReader::Parsed(Box::new(parser))
            }
            (Calls::None | Calls::Parsed, _) => CallReader::None,
            (Calls::Named(name), _) => CallReader::Named {
                name: name.clone(),
                announced: false,
            },
            (Calls::Listed(key), _) => CallReader::Listed(Box::new(Listed::new(key)), key),
        };
        let reasoning = reasoning.transpose()?;
        let thoughts = reasoning
            .as_ref()
            .map(|parser| Thoughts::new(parser, model));
        Ok(Self {
            reasoning,
            calls,
            thoughts: thoughts.unwrap_or_default(),
            has_parser: model.card.reasoning_parser.is_some()
                || model.card.tool_call_parser.is_some(),
        })
    }

    /// Says whether all text is content, so that nothing need be read.
    pub(super) fn is_plain(&self) -> bool {
        self.reasoning.is_none() && matches!(self.calls, CallReader::None)
    }

    /// Says whether the model is served with a parser: then hiding thoughts hides all that could tell of them.
    pub(super) fn has_parser(&self) -> bool {
        self.has_parser
    }

    /// Says whether special tokens must be part of the text.
    pub(super) fn needs_special_tokens(&self) -> bool {
        let calls = match &self.calls {
            CallReader::Parsed(parser) => parser.needs_special_tokens(),
            CallReader::None | CallReader::Named { .. } | CallReader::Listed(..) => false,
        };
        calls
            || self
                .reasoning
                .as_ref()
                .is_some_and(ReasoningParser::needs_special_tokens)
    }

    /// Returns how many tokens were thoughts; `None` where nobody looks for them.
    pub(super) fn thought(&self) -> Option<usize> {
        self.reasoning.as_ref().map(|_| self.thoughts.count)
    }

    /// Reads on.
    ///
    /// - `tokens`: what made the text.
    /// - `finished`: nothing comes after `text`.
    pub(super) fn push(&mut self, text: &str, tokens: &[u32], finished: bool) -> Parsed {
        let Some(reasoning) = &mut self.reasoning else {
            return self.calls.push(text, finished);
        };
        let Reasoned {
            reasoning: mut thoughts,
            text: mut rest,
        } = reasoning.push(text);
        self.thoughts.push(tokens, reasoning.is_in_reasoning());
        if finished {
            let last = reasoning.finish();
            thoughts.push_str(&last.reasoning);
            rest.push_str(&last.text);
        }
        Parsed {
            reasoning: thoughts,
            ..self.calls.push(&rest, finished)
        }
    }

    /// Reads a whole answer.
    pub(super) fn whole(self, text: &str) -> Parsed {
        match self.reasoning {
            None => self.calls.whole(text),
            Some(reasoning) => {
                let Reasoned { reasoning, text } = reasoning.parse_complete(text);
                Parsed {
                    reasoning,
                    ..self.calls.whole(&text)
                }
            }
        }
    }
}

impl CallReader {
    fn push(&mut self, text: &str, finished: bool) -> Parsed {
        let mut parsed = Parsed::default();
        match self {
            Self::None => parsed.content.push_str(text),
            Self::Parsed(parser) => {
                let mut found = parser.push(text, &mut rand::random);
                if finished {
                    let last = parser.finish(&mut rand::random);
                    found.text.push_str(&last.text);
                    found.calls.extend(last.calls);
                }
                parsed.content = found.text;
                parsed.calls = found.calls.into_iter().map(CallDelta::from).collect();
            }
            Self::Named { name, announced } => {
                if !*announced || !text.is_empty() {
                    let name = (!std::mem::replace(announced, true)).then(|| name.clone());
                    let arguments = Some(text.to_owned());
                    parsed.calls.push(CallDelta {
                        index: 0,
                        id: None,
                        name,
                        arguments,
                    });
                }
            }
            Self::Listed(listed, _) => listed.push(text, &mut parsed.calls),
        }
        parsed
    }

    fn whole(mut self, text: &str) -> Parsed {
        let calls = match &self {
            Self::None => return self.push(text, true),
            Self::Parsed(parser) => {
                let (content, calls) = parser.parse_complete(text, &mut rand::random);
                let calls = calls
                    .into_iter()
                    .enumerate()
                    .map(|(index, call)| CallDelta {
                        index,
                        id: Some(call.id),
                        name: Some(call.name),
                        arguments: Some(call.arguments),
                    });
                return Parsed {
                    content,
                    calls: calls.collect(),
                    ..Parsed::default()
                };
            }
            Self::Named { .. } if text.trim().is_empty() => Vec::new(),
            Self::Named { .. } => return self.push(text, true),
            Self::Listed(_, key) => listed::whole(text, key),
        };
        Parsed {
            calls,
            ..Parsed::default()
        }
    }
}

impl From<ToolCallDelta> for CallDelta {
    fn from(delta: ToolCallDelta) -> Self {
        let ToolCallDelta {
            index,
            id,
            name,
            arguments,
        } = delta;
        Self {
            index,
            id,
            name,
            arguments: Some(arguments).filter(|arguments| !arguments.is_empty()),
        }
    }
}
