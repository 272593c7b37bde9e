//! Forms that put a call's arguments, by a JSON schema, between markers.

use serde_json::Value;

use super::formats::{Count, regex, schema, separated, sequence, tag, text, triggered};
use super::{Force, schema_of};
use crate::openai::chat::types::Tool;

/// What may not come in text before a call.
const THOUGHTS: [&str; 2] = ["<think>", "</think>"];
/// The same for Kimi K2, where a call belongs into a section.
const THOUGHTS_AND_CALLS: [&str; 3] = ["<think>", "</think>", "<|tool_call_begin|>"];

/// The markers of one family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::openai::chat) struct Marked {
    /// How one call is written; the first way is the usual one.
    ways: &'static [Way],
    /// How arguments are written.
    style: &'static str,
    around: Around,
}

/// Before the name, between name and arguments, after the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way(&'static str, &'static str, &'static str);

/// What stands around calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Around {
    /// Nothing: a marker begins a call, and calls that must come follow each other.
    Nothing { marker: &'static str },
    /// Text: also where a call must come.
    Text { marker: &'static str },
    /// A section of calls.
    Section(Section),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Section {
    begin: &'static str,
    end: &'static str,
    /// The part of `begin` that tells the section from text.
    marker: &'static str,
    /// Between two calls.
    separator: &'static str,
    /// Before a section that must come.
    lead: &'static str,
    /// How a section that must come is put together.
    joined: Joined,
    excludes: &'static [&'static str],
}

/// The shape of a section that must come. They accept the same, but their grammars are others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joined {
    /// As one tag.
    Tag,
    /// As texts before and after; a call that was named is a tag by itself.
    Sequence,
    /// The same, and a call that was named is a list of one.
    SequenceOfLists,
}

impl Marked {
    /// Returns the form of a tool parser, where it is one of these.
    pub(super) fn of(parser: &str) -> Option<Self> {
        Some(match parser {
            "hermes" | "qwen3_json" => Self::hermes(
                &[
                    Way(
                        "<tool_call>\n{\"name\": \"",
                        "\", \"arguments\": ",
                        "}\n</tool_call>",
                    ),
                    Way(
                        "<tool_call>{\"name\": \"",
                        "\", \"arguments\": ",
                        "}</tool_call>",
                    ),
                ],
                "<tool_call>",
            ),
            "longcat" => Self::hermes(
                &[
                    Way(
                        "<longcat_tool_call>\n{\"name\": \"",
                        "\", \"arguments\": ",
                        "}\n</longcat_tool_call>",
                    ),
                    Way(
                        "<longcat_tool_call>{\"name\": \"",
                        "\", \"arguments\": ",
                        "}</longcat_tool_call>",
                    ),
                ],
                "<longcat_tool_call>",
            ),
            "llama3_json" | "llama4_json" => Self {
                ways: &[Way("{\"name\": \"", "\", \"parameters\": ", "}")],
                style: "json",
                around: Around::Text {
                    marker: "{\"name\": ",
                },
            },
            "qwen3_coder" | "qwen3_xml" => Self {
                ways: &[Way(
                    "<tool_call>\n<function=",
                    ">\n",
                    "\n</function>\n</tool_call>",
                )],
                style: "qwen_xml",
                around: Around::Text {
                    marker: "<tool_call>\n<function=",
                },
            },
            "deepseek_v3" => Self {
                ways: &[Way(
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                    "\n```json\n",
                    "\n```<｜tool▁call▁end｜>",
                )],
                style: "json",
                around: Around::Section(Section {
                    separator: "\n",
                    ..Section::DEEPSEEK
                }),
            },
            "deepseek_v31" => Self {
                ways: &[Way(
                    "<｜tool▁call▁begin｜>",
                    "<｜tool▁sep｜>",
                    "<｜tool▁call▁end｜>",
                )],
                style: "json",
                around: Around::Section(Section::DEEPSEEK),
            },
            "deepseek_v32" => Self {
                ways: &[Way(
                    "<｜DSML｜invoke name=\"",
                    "\">\n",
                    "</｜DSML｜invoke>\n",
                )],
                style: "deepseek_xml",
                around: Around::Section(Section {
                    begin: "<｜DSML｜function_calls>\n",
                    end: "</｜DSML｜function_calls>",
                    marker: "<｜DSML｜function_calls>",
                    ..Section::LINES
                }),
            },
            "deepseek_v4" => Self {
                ways: &[Way(
                    "<｜DSML｜invoke name=\"",
                    "\">\n",
                    "</｜DSML｜invoke>\n",
                )],
                style: "deepseek_xml",
                around: Around::Section(Section {
                    begin: "<｜DSML｜tool_calls>\n",
                    end: "</｜DSML｜tool_calls>",
                    marker: "<｜DSML｜tool_calls>",
                    ..Section::LINES
                }),
            },
            "deepseek_v41" => Self {
                ways: &[Way(
                    "<｜DSML｜ invoke name=\"",
                    "\">\n",
                    "</｜DSML｜ invoke>\n",
                )],
                style: "deepseek_v4_1_xml",
                around: Around::Section(Section {
                    begin: "<｜DSML｜ calls>\n",
                    end: "</｜DSML｜ calls>",
                    marker: "<｜DSML｜ calls>",
                    ..Section::LINES
                }),
            },
            "minimax_m2" => Self {
                ways: &[Way("<invoke name=\"", "\">\n", "</invoke>\n")],
                style: "minimax_xml",
                around: Around::Section(Section {
                    begin: "<minimax:tool_call>\n",
                    end: "</minimax:tool_call>",
                    marker: "<minimax:tool_call>",
                    lead: "\n",
                    joined: Joined::SequenceOfLists,
                    ..Section::LINES
                }),
            },
            "kimi_k2" => Self {
                // A call has a number between its name and its arguments.
                ways: &[Way(
                    "<|tool_call_begin|>functions.",
                    NUMBERED,
                    "<|tool_call_end|>",
                )],
                style: "json",
                around: Around::Section(Section {
                    begin: "<|tool_calls_section_begin|>",
                    end: "<|tool_calls_section_end|>",
                    marker: "<|tool_calls_section_begin|>",
                    lead: "",
                    excludes: &THOUGHTS_AND_CALLS,
                    ..Section::LINES
                }),
            },
            _ => return None,
        })
    }

    fn hermes(ways: &'static [Way], marker: &'static str) -> Self {
        Self {
            ways,
            style: "json",
            around: Around::Nothing { marker },
        }
    }

    pub(super) fn format(self, tools: &[Tool], force: Force, single: bool) -> Value {
        let calls: Vec<Value> = tools
            .iter()
            .flat_map(|tool| self.ways.iter().map(|way| self.call(*way, tool, "", "")))
            .collect();
        let any = Count::Any.bounded(single);
        let some = Count::Some.bounded(single);
        match (self.around, force) {
            (Around::Nothing { marker }, Force::No) => triggered(marker, &calls, any, &[]),
            (Around::Nothing { .. }, Force::Any) => separated(&calls, "", some),
            (Around::Nothing { .. }, Force::One) => separated(&calls, "", Count::One),
            (Around::Text { marker }, Force::No) => triggered(marker, &calls, any, &THOUGHTS),
            (Around::Text { marker }, Force::Any) => triggered(marker, &calls, some, &THOUGHTS),
            (Around::Text { .. }, Force::One) => self.call(self.ways[0], &tools[0], "", ""),
            (Around::Section(section), Force::No) => {
                let list = separated(&calls, section.separator, some);
                let whole = tag(section.begin, &list, section.end);
                triggered(section.marker, &[whole], any, section.excludes)
            }
            (Around::Section(section), Force::Any) => {
                let list = separated(&calls, section.separator, some);
                match section.joined {
                    Joined::Tag => tag(section.begin, &list, section.end),
                    Joined::Sequence | Joined::SequenceOfLists => section.sequence(list),
                }
            }
            (Around::Section(section), Force::One) => match section.joined {
                Joined::Tag => self.call(self.ways[0], &tools[0], section.begin, section.end),
                Joined::Sequence => section.sequence(self.call(self.ways[0], &tools[0], "", "")),
                Joined::SequenceOfLists => {
                    section.sequence(separated(&calls, section.separator, Count::One))
                }
            },
        }
    }

    /// One call, with texts around it.
    fn call(self, way: Way, tool: &Tool, before: &str, after: &str) -> Value {
        let Way(begin, between, end) = way;
        let name = &tool.function.name;
        let arguments = schema(&schema_of(tool), self.style);
        let end = format!("{end}{after}");
        if between == NUMBERED {
            let marker = text("<|tool_call_argument_begin|>");
            let content = sequence(&[regex(r"\d+"), marker, arguments]);
            return tag(&format!("{before}{begin}{name}:"), &content, &end);
        }
        tag(&format!("{before}{begin}{name}{between}"), &arguments, &end)
    }
}

/// Stands for `:`, a number, and the marker of arguments (Kimi K2).
const NUMBERED: &str = ":0<|tool_call_argument_begin|>";

impl Section {
    const DEEPSEEK: Self = Self {
        begin: "<｜tool▁calls▁begin｜>",
        end: "<｜tool▁calls▁end｜>",
        marker: "<｜tool▁calls▁begin｜>",
        separator: "",
        lead: "",
        joined: Joined::Tag,
        excludes: &THOUGHTS,
    };

    /// What the sections in lines have in common; their markers are still to be said.
    const LINES: Self = Self {
        begin: "",
        end: "",
        marker: "",
        separator: "",
        lead: "\n\n",
        joined: Joined::Sequence,
        excludes: &THOUGHTS,
    };

    fn sequence(self, calls: Value) -> Value {
        let begin = text(&format!("{}{}", self.lead, self.begin));
        sequence(&[begin, calls, text(self.end)])
    }
}
