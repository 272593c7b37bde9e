//! How a model is made to call tools: by a structural tag in its own form, or by a JSON schema.
//!
//! Grammars must be those of vLLM 0.32, or other tokens come out: which of its tool parsers has which form
//! (`tool_parsers/*.py`), what the forms are (`structural_tag_registry.py`, and `builtin_structural_tag.py` of
//! xgrammar). The golden file `tests/golden/constraints.json` holds what vLLM makes of many requests.

mod asked;
mod formats;
mod glm;
mod hy_v4;
mod kimi_k3;
mod marked;
mod xgrammar;

use serde_json::Value;

use super::types::Tool;

pub(super) use asked::either;
use marked::Marked;

/// How the model of a tool parser is made to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// In its own form.
    Own(Own),
    /// With bare JSON: the list of calls under these keys, or the arguments of the one that was named.
    Json,
    /// With a bare JSON list of calls, also of the one that was named (Mistral).
    JsonList,
    /// Not at all: a call is hoped for.
    Unforced,
}

/// The form of one family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    /// JSON or XML of a schema between markers.
    Marked(Marked),
    Glm,
    HyV4,
    KimiK3,
}

/// Whether there must be a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Force {
    /// Text may come, and calls within it.
    No,
    /// Nothing but calls of these tools may come.
    Any,
    /// One call of the only tool, and nothing else.
    One,
}

/// Returns the form of a tool parser, by vLLM's name of it; without a parser only bare JSON can be read.
pub(super) fn form(parser: Option<&str>) -> Form {
    match parser.unwrap_or_default() {
        "glm45" | "glm47" => Form::Own(Own::Glm),
        "hy_v4" => Form::Own(Own::HyV4),
        "kimi_k3" => Form::Own(Own::KimiK3),
        "mistral" => Form::JsonList,
        "gemma4" | "inkling" | "minimax_m3" => Form::Unforced,
        parser => Marked::of(parser).map_or(Form::Json, |marked| Form::Own(Own::Marked(marked))),
    }
}

impl Own {
    /// Says whether calls are held to the form even if nothing asks for it.
    pub(super) fn always(self) -> bool {
        self == Self::Glm
    }

    /// Says whether calls that may happen are never held to the form: it would cost every answer time.
    pub(super) fn only_forced(self) -> bool {
        self == Self::HyV4
    }

    /// Returns the structural tag for calls of `tools`, of which there is at least one.
    ///
    /// - `single`: no second call may follow.
    ///
    /// Arguments are held to a tool's schema only if the tool is `strict`; else any JSON may come.
    pub(super) fn tag(self, tools: &[Tool], force: Force, single: bool) -> Value {
        formats::structural_tag(&self.format(tools, force, single))
    }

    fn format(self, tools: &[Tool], force: Force, single: bool) -> Value {
        match self {
            Self::Marked(marked) => marked.format(tools, force, single),
            Self::Glm => glm::format(tools, force, single),
            Self::HyV4 => hy_v4::format(tools, force, single),
            Self::KimiK3 => kimi_k3::format(tools, force, single),
        }
    }
}

/// Says whether a tool's arguments are held to its schema.
pub(super) fn is_strict(tool: &Tool) -> bool {
    tool.function.strict == Some(true)
}

/// Returns the schema that a tool's arguments are held to; `true` is any JSON.
fn schema_of(tool: &Tool) -> Value {
    match &tool.function.parameters {
        Some(parameters) if is_strict(tool) => Value::Object(parameters.clone()),
        _ => Value::Bool(true),
    }
}
