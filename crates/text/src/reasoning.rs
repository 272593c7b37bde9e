//! What a model thought and what it answered, complete or streaming.
//!
//! The formats are those of the `reasoning-parser` crate (smg-project/smg), under the names of vLLM's
//! `--reasoning-parser`. Whether an answer begins inside the reasoning is decided here as vLLM does: by what
//! the prompt ends with, and otherwise by the format's habit.

use reasoning_parser::traits::{DEFAULT_MAX_BUFFER_SIZE, ParserConfig};
use reasoning_parser::{BaseReasoningParser, ParserFactory, ReasoningParser as Inner};
use stator_common::code::Code;

use crate::markers::Guard;

/// Where an answer begins if the prompt does not say.
#[derive(Clone, Copy)]
enum Begins {
    /// In the reasoning.
    Reasoning,
    /// In the reasoning, unless the request switches thinking off.
    ReasoningUnlessOff,
    /// In the answer, unless the request switches thinking on.
    AnswerUnlessOn,
    /// In the answer: the format announces reasoning by itself.
    Answer,
}

/// A format under vLLM's name.
struct Format {
    name: &'static str,
    parser: Parser,
    begins: Begins,
}

#[derive(Clone, Copy)]
enum Parser {
    /// Reasoning between two markers.
    Marked {
        start: &'static str,
        end: &'static str,
    },
    /// The parser crate's own.
    Named(&'static str),
}

const THINK: Parser = Parser::Marked {
    start: "<think>",
    end: "</think>",
};

const fn format(name: &'static str, parser: Parser, begins: Begins) -> Format {
    Format {
        name,
        parser,
        begins,
    }
}

/// vLLM 0.32's names (`reasoning/__init__.py`) for which there is a parser, sorted; how an answer begins is
/// from the parsers behind them (`parser/*.py`, `reasoning/*.py`).
const FORMATS: &[Format] = &[
    format(
        "cohere_command3",
        Parser::Named("cohere_cmd"),
        Begins::Answer,
    ),
    format(
        "cohere_command4",
        Parser::Named("cohere_cmd"),
        Begins::Answer,
    ),
    format("deepseek_r1", THINK, Begins::Reasoning),
    format("deepseek_v3", THINK, Begins::AnswerUnlessOn),
    format("deepseek_v4", THINK, Begins::AnswerUnlessOn),
    format(
        "deepseek_v41",
        Parser::Named("deepseek_v41"),
        Begins::AnswerUnlessOn,
    ),
    format("gemma4", Parser::Named("gemma4"), Begins::Answer),
    format("glm45", THINK, Begins::ReasoningUnlessOff),
    format("glm47", THINK, Begins::ReasoningUnlessOff),
    format("holo2", THINK, Begins::ReasoningUnlessOff),
    format("hy_v4", Parser::Named("hy_v4"), Begins::Answer),
    format("inkling", Parser::Named("inkling"), Begins::Answer),
    format("kimi_k2", THINK, Begins::ReasoningUnlessOff),
    format("kimi_k3", Parser::Named("kimi_k3"), Begins::Answer),
    format("mimo", THINK, Begins::ReasoningUnlessOff),
    format("minimax_m2", THINK, Begins::Reasoning),
    format("minimax_m3", Parser::Named("minimax_m3"), Begins::Answer),
    format(
        "mistral",
        Parser::Marked {
            start: "[THINK]",
            end: "[/THINK]",
        },
        Begins::Answer,
    ),
    format("nemotron_v3", THINK, Begins::ReasoningUnlessOff),
    format("qwen3", THINK, Begins::ReasoningUnlessOff),
    format(
        "seed_oss",
        Parser::Marked {
            start: "<seed:think>",
            end: "</seed:think>",
        },
        Begins::Reasoning,
    ),
    format("step3", THINK, Begins::Reasoning),
];

/// A piece of a stream, or all of it, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasoned {
    /// What was thought.
    pub reasoning: String,
    /// What was answered.
    pub text: String,
}

/// No parser has this name.
#[derive(Debug, thiserror::Error)]
#[error("no reasoning parser is named {name:?}; there are {}", names().join(", "))]
pub struct UnknownReasoningParser {
    /// The name.
    pub name: String,
}

impl UnknownReasoningParser {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        Code::InvalidRequest
    }
}

/// Returns the names of all parsers.
pub fn names() -> Vec<&'static str> {
    FORMATS.iter().map(|format| format.name).collect()
}

/// Takes one answer apart.
pub struct ReasoningParser {
    name: &'static str,
    markers: Option<(&'static str, &'static str)>,
    inner: Box<dyn Inner>,
    guard: Guard,
}

impl std::fmt::Debug for ReasoningParser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReasoningParser")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl ReasoningParser {
    /// Returns a parser for one answer.
    ///
    /// - `name`: as in vLLM's `--reasoning-parser`.
    /// - `prompt`: the rendered prompt; if it ends with a marker, that decides where the answer begins.
    /// - `thinking`: what the request's `chat_template_kwargs` say (`enable_thinking` or `thinking`), if anything.
    ///
    /// # Errors
    /// [`UnknownReasoningParser`].
    pub fn new(
        name: &str,
        prompt: &str,
        thinking: Option<bool>,
    ) -> Result<Self, UnknownReasoningParser> {
        let unknown = || UnknownReasoningParser {
            name: name.to_owned(),
        };
        let format = FORMATS
            .iter()
            .find(|format| format.name == name)
            .ok_or_else(unknown)?;
        let by_habit = match format.begins {
            Begins::Reasoning => true,
            Begins::ReasoningUnlessOff => thinking != Some(false),
            Begins::AnswerUnlessOn => thinking == Some(true),
            Begins::Answer => false,
        };
        let prompt = prompt.trim_end();
        let (mut inner, markers, in_reasoning): (Box<dyn Inner>, _, _) = match format.parser {
            Parser::Marked { start, end } => {
                let config = ParserConfig {
                    think_start_token: start.to_owned(),
                    think_end_token: end.to_owned(),
                    stream_reasoning: true,
                    max_buffer_size: DEFAULT_MAX_BUFFER_SIZE,
                    always_in_reasoning: false,
                };
                let in_reasoning = prompt.ends_with(start) || (by_habit && !prompt.ends_with(end));
                (
                    Box::new(BaseReasoningParser::new(config)),
                    vec![start, end],
                    in_reasoning,
                )
            }
            Parser::Named(parser) => {
                let factory = ParserFactory::new();
                let inner = factory
                    .registry()
                    .create_parser(parser)
                    .ok_or_else(unknown)?;
                (inner, Vec::new(), by_habit || prompt.ends_with("<think>"))
            }
        };
        if in_reasoning {
            inner.mark_reasoning_started();
        }
        Ok(Self {
            name: format.name,
            inner,
            markers: match format.parser {
                Parser::Marked { start, end } => Some((start, end)),
                Parser::Named(_) => None,
            },
            guard: Guard::new(markers),
        })
    }

    /// Returns the markers before and after reasoning, where the format is nothing but these two.
    pub fn markers(&self) -> Option<(&'static str, &'static str)> {
        self.markers
    }

    /// Says whether special tokens must reach the parser: `skip_special_tokens` is then to be false.
    pub fn needs_special_tokens(&self) -> bool {
        self.inner.requires_special_tokens()
    }

    /// Says whether the stream is inside the reasoning now.
    pub fn is_in_reasoning(&self) -> bool {
        self.inner.is_in_reasoning()
    }

    /// Takes the next piece of a stream.
    pub fn push(&mut self, text: &str) -> Reasoned {
        let text = self.guard.push(text);
        self.take(text)
    }

    /// Ends a stream: gives what was held as the possible start of a marker.
    pub fn finish(&mut self) -> Reasoned {
        let held = self.guard.finish();
        let mut last = self.take(held);
        if let Ok(rest) = self.inner.flush() {
            last.reasoning.push_str(&rest.reasoning_text);
            last.text.push_str(&rest.normal_text);
        }
        last
    }

    /// Takes a complete answer apart.
    pub fn parse_complete(mut self, text: &str) -> Reasoned {
        match self.inner.detect_and_parse_reasoning(text) {
            Ok(parsed) => Reasoned {
                reasoning: parsed.reasoning_text,
                text: parsed.normal_text,
            },
            // More text than the parser takes (4 MiB) is an answer as it is.
            Err(_) => Reasoned {
                reasoning: String::new(),
                text: text.to_owned(),
            },
        }
    }

    fn take(&mut self, text: String) -> Reasoned {
        if text.is_empty() {
            return Reasoned::default();
        }
        match self.inner.parse_reasoning_streaming_incremental(&text) {
            Ok(parsed) => Reasoned {
                reasoning: parsed.reasoning_text,
                text: parsed.normal_text,
            },
            Err(_) => Reasoned {
                reasoning: String::new(),
                text,
            },
        }
    }
}
