//! What a model thought and what it answered, complete or streaming.
//!
//! The formats are those of the `reasoning-parser` crate (smg-project/smg), under the names of vLLM's
//! `--reasoning-parser`. Whether an answer begins inside the reasoning is decided here as vLLM does: by what
//! the prompt ends with, and otherwise by the format's habit.

use reasoning_parser::traits::{DEFAULT_MAX_BUFFER_SIZE, ParserConfig};
use reasoning_parser::{BaseReasoningParser, ParserFactory, ReasoningParser as Inner};
use stator_common::code::Code;

mod marked;

use crate::markers::Guard;
use marked::{Marked, Rules};

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
    /// The same, with the habits of vLLM's parser engine.
    Engine(Rules),
    /// The parser crate's own.
    Named(&'static str),
}

const THINK: Parser = Parser::Marked {
    start: "<think>",
    end: "</think>",
};

/// As vLLM's engine reads reasoning that ends with a call of this form.
const fn engine(calls: &'static [&'static str]) -> Rules {
    Rules {
        start: "<think>",
        end: "</think>",
        calls,
        reopens: false,
        strips: true,
    }
}

/// What begins a call of DeepSeek V4, and what it makes of that at times.
const DEEPSEEK_CALLS: &[&str] = &[
    "<｜DSML｜tool_calls>",
    "<｜DSML｜toolcalls>",
    "<｜DSML｜tool>",
];

const DEEPSEEK_V4: Parser = Parser::Engine(Rules {
    reopens: true,
    ..engine(DEEPSEEK_CALLS)
});
const GLM: Parser = Parser::Engine(Rules {
    reopens: true,
    ..engine(&["<tool_call>"])
});
const QWEN: Parser = Parser::Engine(Rules {
    strips: false,
    ..engine(&["<tool_call>"])
});

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
    format("deepseek_v4", DEEPSEEK_V4, Begins::AnswerUnlessOn),
    format(
        "deepseek_v41",
        Parser::Named("deepseek_v41"),
        Begins::AnswerUnlessOn,
    ),
    format("gemma4", Parser::Named("gemma4"), Begins::Answer),
    format("glm45", GLM, Begins::ReasoningUnlessOff),
    format("glm47", GLM, Begins::ReasoningUnlessOff),
    format("holo2", THINK, Begins::ReasoningUnlessOff),
    format("hy_v4", Parser::Named("hy_v4"), Begins::Answer),
    format("inkling", Parser::Named("inkling"), Begins::Answer),
    format(
        "kimi_k2",
        Parser::Engine(engine(&["<|tool_calls_section_begin|>"])),
        Begins::ReasoningUnlessOff,
    ),
    format("kimi_k3", Parser::Named("kimi_k3"), Begins::Answer),
    format("mimo", QWEN, Begins::ReasoningUnlessOff),
    format(
        "minimax_m2",
        Parser::Engine(engine(&["<minimax:tool_call>"])),
        Begins::Reasoning,
    ),
    format("minimax_m3", Parser::Named("minimax_m3"), Begins::Answer),
    format(
        "mistral",
        Parser::Marked {
            start: "[THINK]",
            end: "[/THINK]",
        },
        Begins::Answer,
    ),
    format(
        "nemotron_v3",
        Parser::Engine(engine(&["<tool_call>"])),
        Begins::ReasoningUnlessOff,
    ),
    format("qwen3", QWEN, Begins::ReasoningUnlessOff),
    format(
        "seed_oss",
        Parser::Engine(Rules {
            start: "<seed:think>",
            end: "</seed:think>",
            calls: &["<seed:tool_call>"],
            reopens: false,
            strips: false,
        }),
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

/// Says whether a parser has this name.
///
/// # Errors
/// [`UnknownReasoningParser`].
pub fn check(name: &str) -> Result<(), UnknownReasoningParser> {
    find(name).map(|_| ())
}

fn find(name: &str) -> Result<&'static Format, UnknownReasoningParser> {
    let mut formats = FORMATS.iter();
    let unknown = || UnknownReasoningParser {
        name: name.to_owned(),
    };
    formats
        .find(|format| format.name == name)
        .ok_or_else(unknown)
}

/// Returns the names of all parsers.
pub fn names() -> Vec<&'static str> {
    FORMATS.iter().map(|format| format.name).collect()
}

/// Takes one answer apart.
pub struct ReasoningParser {
    name: &'static str,
    markers: Option<(&'static str, &'static str)>,
    reader: Reader,
}

/// What reads the answer.
enum Reader {
    Marked(Box<Marked>),
    /// The parser crate; the guard keeps markers whole for it.
    Crate {
        inner: Box<dyn Inner>,
        guard: Guard,
    },
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
        let format = find(name)?;
        let by_habit = match format.begins {
            Begins::Reasoning => true,
            Begins::ReasoningUnlessOff => thinking != Some(false),
            Begins::AnswerUnlessOn => thinking == Some(true),
            Begins::Answer => false,
        };
        let prompt = prompt.trim_end();
        let in_reasoning = |start: &str, end: &str| {
            prompt.ends_with(start) || (by_habit && !prompt.ends_with(end))
        };
        let begun = |mut inner: Box<dyn Inner>, in_reasoning: bool, markers| {
            if in_reasoning {
                inner.mark_reasoning_started();
            }
            let guard = Guard::new(markers);
            Reader::Crate { inner, guard }
        };
        let (reader, markers) = match format.parser {
            Parser::Engine(rules) => {
                let Rules { start, end, .. } = rules;
                let marked = Marked::new(rules, in_reasoning(start, end));
                (Reader::Marked(Box::new(marked)), Some((start, end)))
            }
            Parser::Marked { start, end } => {
                let config = ParserConfig {
                    think_start_token: start.to_owned(),
                    think_end_token: end.to_owned(),
                    stream_reasoning: true,
                    max_buffer_size: DEFAULT_MAX_BUFFER_SIZE,
                    always_in_reasoning: false,
                };
                let inner = Box::new(BaseReasoningParser::new(config));
                let reader = begun(inner, in_reasoning(start, end), vec![start, end]);
                (reader, Some((start, end)))
            }
            Parser::Named(parser) => {
                let factory = ParserFactory::new();
                let inner = factory
                    .registry()
                    .create_parser(parser)
                    .ok_or_else(unknown)?;
                let in_reasoning = by_habit || prompt.ends_with("<think>");
                (begun(inner, in_reasoning, Vec::new()), None)
            }
        };
        Ok(Self {
            name: format.name,
            markers,
            reader,
        })
    }

    /// Returns the markers before and after reasoning, where the format is nothing but these two.
    pub fn markers(&self) -> Option<(&'static str, &'static str)> {
        self.markers
    }

    /// Says whether special tokens must reach the parser: `skip_special_tokens` is then to be false.
    pub fn needs_special_tokens(&self) -> bool {
        match &self.reader {
            // vLLM's engine asks for them, whether a marker is one or not.
            Reader::Marked(_) => true,
            Reader::Crate { inner, .. } => inner.requires_special_tokens(),
        }
    }

    /// Says whether the stream is inside the reasoning now.
    pub fn is_in_reasoning(&self) -> bool {
        match &self.reader {
            Reader::Marked(marked) => marked.is_thinking(),
            Reader::Crate { inner, .. } => inner.is_in_reasoning(),
        }
    }

    /// Takes the next piece of a stream.
    pub fn push(&mut self, text: &str) -> Reasoned {
        match &mut self.reader {
            Reader::Marked(marked) => marked.push(text),
            Reader::Crate { inner, guard } => take(inner.as_mut(), guard.push(text)),
        }
    }

    /// Ends a stream: gives what was held as the possible start of a marker.
    pub fn finish(&mut self) -> Reasoned {
        match &mut self.reader {
            Reader::Marked(marked) => marked.finish(),
            Reader::Crate { inner, guard } => {
                let mut last = take(inner.as_mut(), guard.finish());
                if let Ok(rest) = inner.flush() {
                    last.reasoning.push_str(&rest.reasoning_text);
                    last.text.push_str(&rest.normal_text);
                }
                last
            }
        }
    }

    /// Takes a complete answer apart.
    pub fn parse_complete(self, text: &str) -> Reasoned {
        let mut inner = match self.reader {
            Reader::Marked(marked) => return marked.whole(text),
            Reader::Crate { inner, .. } => inner,
        };
        match inner.detect_and_parse_reasoning(text) {
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
}

fn take(inner: &mut dyn Inner, text: String) -> Reasoned {
    if text.is_empty() {
        return Reasoned::default();
    }
    match inner.parse_reasoning_streaming_incremental(&text) {
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
