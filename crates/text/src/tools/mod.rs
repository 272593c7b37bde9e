//! Tool calls in a model's answer, complete or streaming.
//!
//! The formats are those of the `tool-parser` crate (smg-project/smg); this module gives its parsers the names
//! that vLLM's `--tool-call-parser` has, takes their `async` away (they never wait), and evens out where their
//! results differ from vLLM's: the spacing of arguments. The Hermes format, the commonest, is read here (`hermes`).

mod at_end;
mod hermes;

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use openai_protocol::common::Tool;
use serde_json::Value;
use stator_common::code::Code;
use tool_parser::{ParserFactory, ToolParser as Inner};

use crate::python_json::{self, PythonJson};

use at_end::{AtEnd, Opens};
use hermes::Hermes;

/// A format: vLLM's name, the parser crate's name, and whether the format is written in special tokens, which
/// detokenization must then keep.
struct Format {
    name: &'static str,
    parser: &'static str,
    special_tokens: bool,
}

const fn format(name: &'static str, parser: &'static str, special_tokens: bool) -> Format {
    Format {
        name,
        parser,
        special_tokens,
    }
}

/// vLLM 0.32's names (`tool_parsers/__init__.py`) for which there is a parser, sorted. `special_tokens` is
/// true where vLLM's parser switches `skip_special_tokens` off.
const FORMATS: &[Format] = &[
    format("cohere_command3", "cohere", true),
    format("cohere_command4", "cohere", true),
    format("deepseek_v3", "deepseek", false),
    format("deepseek_v31", "deepseek31", false),
    format("deepseek_v32", "deepseek32", true),
    format("deepseek_v4", "deepseek_v4", true),
    format("deepseek_v41", "deepseek_v41", true),
    format("gemma4", "gemma4", true),
    format("glm45", "glm45_moe", true),
    format("glm47", "glm47_moe", true),
    format("hermes", HERMES, true),
    format("hy_v4", "hy_v4", true),
    format("inkling", "inkling", true),
    format("kimi_k2", "kimik2", true),
    format("kimi_k3", "kimi_k3", true),
    format("llama3_json", "llama", false),
    format("llama4_json", "llama", false),
    format("llama4_pythonic", "pythonic", false),
    format("minimax_m2", "minimax_m2", false),
    format("minimax_m3", "minimax_m3", true),
    format("mistral", "mistral", true),
    format("pythonic", "pythonic", false),
    format("qwen3_coder", "qwen_xml", true),
    format("qwen3_json", HERMES, true),
    format("qwen3_xml", "qwen_xml", true),
    format("step3", "step3", true),
];

/// The parser crate's name of Cohere's format. Its text has markers too, which the crate takes out of it.
const COHERE: &str = "cohere";
/// The parser crate's name of the Hermes format.
const HERMES: &str = "qwen";

/// Characters that the parser crate gets at once.
const SLICE: usize = 16;

/// The random part of a call's id is 64 bits, as vLLM's (`utils/__init__.py::random_uuid`).
type NewId<'a> = dyn FnMut() -> u64 + 'a;

/// A part of a tool call, as a stream shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// Which of the answer's calls, from 0.
    pub index: usize,
    /// `chatcmpl-tool-<hex>`, with the first delta of a call.
    pub id: Option<String>,
    /// The function's name, with the first delta of a call.
    pub name: Option<String>,
    /// The next part of the arguments' JSON text.
    pub arguments: String,
}

/// A complete tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// `chatcmpl-tool-<hex>`.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments, as JSON text.
    pub arguments: String,
}

/// What a piece of a stream turned out to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedDelta {
    /// Text that is part of no call.
    pub text: String,
    /// Parts of calls.
    pub calls: Vec<ToolCallDelta>,
}

impl ParsedDelta {
    /// Joins what follows each other in one call.
    fn merge(&mut self) {
        self.calls.dedup_by(|next, delta| {
            let joined = next.index == delta.index && next.name.is_none();
            if joined {
                delta.arguments.push_str(&next.arguments);
            }
            joined
        });
    }
}

/// Why there is no parser.
#[derive(Debug, thiserror::Error)]
pub enum ToolParserError {
    /// No parser has this name.
    #[error("no tool call parser is named {name:?}; there are {}", names().join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// A tool is not defined as the API asks for.
    #[error("tools[{index}]: {reason}")]
    Tool {
        /// Its place in the list.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl ToolParserError {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        match self {
            Self::Unknown { .. } | Self::Tool { .. } => Code::InvalidRequest,
        }
    }
}

/// Says whether a parser has this name.
///
/// # Errors
/// [`ToolParserError::Unknown`].
pub fn check(name: &str) -> Result<(), ToolParserError> {
    find(name).map(|_| ())
}

fn find(name: &str) -> Result<&'static Format, ToolParserError> {
    let mut formats = FORMATS.iter();
    formats
        .find(|format| format.name == name)
        .ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> ToolParserError {
    ToolParserError::Unknown {
        name: name.to_owned(),
    }
}

/// Returns the names of all parsers.
pub fn names() -> Vec<&'static str> {
    FORMATS.iter().map(|format| format.name).collect()
}

/// Finds the tool calls in one answer.
pub struct ToolParser {
    format: &'static Format,
    inner: Box<dyn Inner>,
    tools: Vec<Tool>,
    hermes: Option<Hermes>,
    at_end: Option<AtEnd>,
    /// One per call of the stream.
    spacing: Vec<PythonJson>,
}

impl std::fmt::Debug for ToolParser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ToolParser")
            .field("format", &self.format.name)
            .finish_non_exhaustive()
    }
}

impl ToolParser {
    /// Returns a parser for one answer.
    ///
    /// - `name`: as in vLLM's `--tool-call-parser`.
    /// - `tools`: the request's tool definitions; some formats take types from their schemas.
    ///
    /// # Errors
    /// [`ToolParserError`].
    pub fn new(name: &str, tools: &[Value]) -> Result<Self, ToolParserError> {
        let format = find(name)?;
        let inner = registry()
            .registry()
            .create_parser(format.parser)
            .ok_or_else(|| unknown(name))?;
        let tools = tools
            .iter()
            .enumerate()
            .map(|(index, tool)| {
                serde_json::from_value(tool.clone()).map_err(|error| ToolParserError::Tool {
                    index,
                    reason: error.to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        let hermes = (format.parser == HERMES).then(Hermes::new);
        let at_end = match format.parser {
            "pythonic" => Some(Opens::WholeAnswer),
            "deepseek" | "deepseek31" => Some(Opens::Marker("<｜tool▁calls▁begin｜>")),
            "glm45_moe" | "glm47_moe" => Some(Opens::Marker("<tool_call>")),
            "kimik2" => Some(Opens::Marker("<|tool_calls_section_begin|>")),
            "step3" => Some(Opens::Marker("<｜tool_calls_begin｜>")),
            COHERE => Some(Opens::Marker("<|START_ACTION|>")),
            _ => None,
        };
        let at_end = at_end.map(AtEnd::new);
        Ok(Self {
            format,
            inner,
            tools,
            hermes,
            at_end,
            spacing: Vec::new(),
        })
    }

    /// Says whether special tokens must reach the parser: `skip_special_tokens` is then to be false.
    pub fn needs_special_tokens(&self) -> bool {
        self.format.special_tokens
    }

    /// Takes the next piece of a stream.
    ///
    /// What the parser cannot make sense of gives nothing until [`Self::finish`].
    pub fn push(&mut self, text: &str, new_id: &mut NewId<'_>) -> ParsedDelta {
        if let Some(at_end) = &mut self.at_end {
            let text = at_end.push(text);
            if self.format.parser == COHERE {
                return self.push_sliced(&text, new_id);
            }
            return ParsedDelta {
                text,
                calls: Vec::new(),
            };
        }
        match &mut self.hermes {
            Some(hermes) => hermes.push(text, new_id),
            None => self.push_sliced(text, new_id),
        }
    }

    /// Feeds the parser in slices: it drops the text in front of a call that comes in one piece with it, and sees no
    /// more than one step of a call per piece.
    fn push_sliced(&mut self, text: &str, new_id: &mut NewId<'_>) -> ParsedDelta {
        let mut all = ParsedDelta::default();
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest
                .char_indices()
                .nth(SLICE)
                .map_or(rest.len(), |(end, _)| end);
            let first = rest.chars().next().map_or(0, char::len_utf8);
            // A slice ends before a marker that it does not begin with.
            let marker = rest[first..end]
                .find(['<', '[', '{', '}'])
                .map_or(end, |at| first + at);
            let (slice, next) = rest.split_at(marker.min(end));
            rest = next;
            let parsed = ready(self.inner.parse_incremental(slice, &self.tools));
            if let Some(Ok(parsed)) = parsed {
                all.text.push_str(&parsed.normal_text);
                for item in parsed.calls {
                    let delta = self.delta(item, new_id);
                    all.calls.push(delta);
                }
            }
        }
        all.merge();
        all
    }

    fn delta(
        &mut self,
        item: tool_parser::types::ToolCallItem,
        new_id: &mut NewId<'_>,
    ) -> ToolCallDelta {
        let index = item.tool_index;
        if self.spacing.len() <= index {
            self.spacing.resize_with(index + 1, PythonJson::default);
        }
        ToolCallDelta {
            index,
            id: item.name.is_some().then(|| call_id(new_id)),
            name: item.name,
            arguments: self.spacing[index].push(&item.parameters),
        }
    }

    /// Ends a stream: gives the rest of a call's arguments, and text that was held as the possible start of a call.
    pub fn finish(&mut self, new_id: &mut NewId<'_>) -> ParsedDelta {
        if let Some(at_end) = &mut self.at_end {
            let rest = at_end.finish();
            let (text, calls) = self.parse_complete(&rest, new_id);
            let text = self.inner.take_unstreamed_normal_text() + &text;
            let calls = calls
                .into_iter()
                .enumerate()
                .map(|(index, call)| ToolCallDelta {
                    index,
                    id: Some(call.id),
                    name: Some(call.name),
                    arguments: call.arguments,
                });
            return ParsedDelta {
                text,
                calls: calls.collect(),
            };
        }
        if let Some(hermes) = &mut self.hermes {
            return hermes.finish(new_id);
        }
        let mut last = ParsedDelta::default();
        for item in self.inner.get_unstreamed_tool_args().unwrap_or_default() {
            let delta = self.delta(item, new_id);
            last.calls.push(delta);
        }
        last.text
            .push_str(&self.inner.take_unstreamed_normal_text());
        last
    }

    /// Parses a complete answer into its text and its calls. Where there is no call, all of it is text.
    pub fn parse_complete(&self, text: &str, new_id: &mut NewId<'_>) -> (String, Vec<ToolCall>) {
        if self.hermes.is_some() {
            return hermes::parse_complete(text, new_id);
        }
        let parsed = ready(self.inner.parse_complete_with_tools(text, &self.tools));
        match parsed {
            Some(Ok((rest, calls))) if !calls.is_empty() => {
                let calls = calls.into_iter().map(|call| ToolCall {
                    id: call_id(new_id),
                    name: call.function.name,
                    arguments: python_json::rewrite(&call.function.arguments)
                        .unwrap_or_else(|| PythonJson::default().push(&call.function.arguments)),
                });
                (rest, calls.collect())
            }
            _ => (text.to_owned(), Vec::new()),
        }
    }
}

fn call_id(new_id: &mut NewId<'_>) -> String {
    format!("chatcmpl-tool-{:016x}", new_id())
}

/// The parsers by name. Making the list takes microseconds, but an answer needs only one of it.
fn registry() -> &'static ParserFactory {
    static REGISTRY: std::sync::OnceLock<ParserFactory> = std::sync::OnceLock::new();
    REGISTRY.get_or_init(ParserFactory::new)
}

/// Returns the result of a future that does not wait; `None` if it does after all.
fn ready<T>(mut future: Pin<Box<dyn Future<Output = T> + Send + '_>>) -> Option<T> {
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
