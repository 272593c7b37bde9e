//! Grammars that the output must follow: which backend compiles them, and what reaches it.
//!
//! An engine has one grammar backend for its lifetime, the one that its first constrained request
//! names. vLLM's front end picks per request under `auto` (xgrammar if it can, else guidance or
//! outlines), so there one client's schema decides for everybody after it; here `auto` is
//! xgrammar, and what xgrammar would silently ignore is refused.
//!
//! Syntax beyond JSON (regular expressions, EBNF, Lark) is left to the engine, which compiles in a
//! thread of its own and fails only the request.

use serde_json::Value;

use super::Invalid;
use crate::{
    request::{Constraint, StructuredOutputs},
    wire::Writer,
};

const FIELD: &str = "structured_outputs";

/// Levels of objects and arrays in a JSON schema (`MAX_STRUCTURED_OUTPUT_JSON_NESTING`) and in a
/// structural tag that wraps schemas (plus `STRUCTURAL_TAG_WRAPPER_NESTING`), sampling_params.py.
const MAX_NESTING: usize = 64;
const MAX_TAG_NESTING: usize = MAX_NESTING + 16;

/// Bytes of a constraint. Ours; compiling takes time and memory that grow with it.
const MAX_BYTES: usize = 1 << 20;

/// What compiles grammars in the engine (`--structured-outputs-config.backend`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    #[default]
    Xgrammar,
    Guidance,
    Outlines,
    LmFormatEnforcer,
}

impl Backend {
    /// Reads the engine's configuration value; `auto` is xgrammar. `None` for an unknown one.
    pub fn from_config(name: &str) -> Option<Self> {
        Some(match name {
            "auto" | "xgrammar" => Self::Xgrammar,
            "guidance" => Self::Guidance,
            "outlines" => Self::Outlines,
            "lm-format-enforcer" => Self::LmFormatEnforcer,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Xgrammar => "xgrammar",
            Self::Guidance => "guidance",
            Self::Outlines => "outlines",
            Self::LmFormatEnforcer => "lm-format-enforcer",
        }
    }
}

/// Checks a constraint and writes `SamplingParams.structured_outputs`.
pub(super) fn encode(
    structured: &StructuredOutputs,
    backend: Option<Backend>,
) -> Result<Vec<u8>, Invalid> {
    let backend = backend.ok_or_else(|| invalid("the engine runs without a tokenizer"))?;
    check(&structured.constraint, backend)?;
    let mut writer = Writer::default();
    let flags = [
        ("disable_any_whitespace", structured.disable_any_whitespace),
        (
            "disable_additional_properties",
            structured.disable_additional_properties,
        ),
    ];
    let flags = flags.iter().filter(|(_, set)| *set);
    let pattern = &structured.whitespace_pattern;
    writer.map(2 + flags.clone().count() + usize::from(pattern.is_some()));
    constraint(&mut writer, &structured.constraint, backend);
    for (name, _) in flags {
        writer.str(name);
        writer.bool(true);
    }
    if let Some(pattern) = pattern {
        writer.str("whitespace_pattern");
        writer.str(pattern);
    }
    writer.str("_backend");
    writer.str(backend.name());
    Ok(writer.bytes)
}

fn constraint(writer: &mut Writer, constraint: &Constraint, backend: Backend) {
    match constraint {
        Constraint::Json(schema) => {
            writer.str("json");
            writer.str(schema);
        }
        Constraint::Regex(regex) => {
            writer.str("regex");
            writer.str(regex);
        }
        // xgrammar knows no choices before vLLM 0.33.
        Constraint::Choice(choices) if backend == Backend::Xgrammar => {
            writer.str("grammar");
            writer.str(&choice_grammar(choices));
        }
        Constraint::Choice(choices) => {
            writer.str("choice");
            writer.array(choices.len());
            choices.iter().for_each(|choice| writer.str(choice));
        }
        Constraint::Grammar(grammar) => {
            writer.str("grammar");
            writer.str(grammar);
        }
        Constraint::JsonObject => {
            writer.str("json_object");
            writer.bool(true);
        }
        Constraint::StructuralTag(tag) => {
            writer.str("structural_tag");
            writer.str(tag);
        }
    }
}

fn check(constraint: &Constraint, backend: Backend) -> Result<(), Invalid> {
    let size = match constraint {
        Constraint::Json(text)
        | Constraint::Regex(text)
        | Constraint::Grammar(text)
        | Constraint::StructuralTag(text) => text.len(),
        Constraint::Choice(choices) => choices.iter().map(String::len).sum(),
        Constraint::JsonObject => 0,
    };
    if size > MAX_BYTES {
        return Err(invalid(format!("{size} bytes, the limit is {MAX_BYTES}")));
    }
    match constraint {
        Constraint::Json(schema) => {
            let schema = parse("json", schema, MAX_NESTING)?;
            if backend == Backend::Xgrammar
                && let Some(keyword) = unsupported_by_xgrammar(&schema)
            {
                return Err(invalid(format!(
                    "the JSON schema uses {keyword}, which xgrammar does not support; \
                     the guidance backend may"
                )));
            }
            Ok(())
        }
        Constraint::StructuralTag(tag) => match parse("structural_tag", tag, MAX_TAG_NESTING)? {
            Value::Object(_) => Ok(()),
            _ => Err(invalid("structural_tag is not a JSON object")),
        },
        // An empty regular expression is a valid one; a NUL in it is not handled by xgrammar.
        Constraint::Regex(regex) if regex.contains('\0') => {
            Err(invalid("regex holds a NUL character"))
        }
        Constraint::Choice(choices) if choices.is_empty() => Err(invalid("choice is empty")),
        Constraint::Grammar(grammar) if grammar.trim().is_empty() => {
            Err(invalid("grammar is empty"))
        }
        Constraint::Regex(_)
        | Constraint::Choice(_)
        | Constraint::Grammar(_)
        | Constraint::JsonObject => Ok(()),
    }
}

fn parse(name: &str, text: &str, limit: usize) -> Result<Value, Invalid> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| invalid(format!("{name} is not valid JSON: {error}")))?;
    if nesting(&value) > limit {
        return Err(invalid(format!("{name} nests deeper than {limit} levels")));
    }
    Ok(value)
}

/// Depth of objects and arrays. Recursion is safe: the parser stops at 128 levels.
fn nesting(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(nesting).max().unwrap_or(0),
        Value::Object(entries) => 1 + entries.values().map(nesting).max().unwrap_or(0),
        _ => 0,
    }
}

/// Writes choices as the EBNF rule that xgrammar reads.
fn choice_grammar(choices: &[String]) -> String {
    let mut grammar = String::from("root ::= ");
    for (index, choice) in choices.iter().enumerate() {
        grammar.push_str(if index > 0 { " | \"" } else { "\"" });
        for character in choice.chars() {
            match character {
                '\\' => grammar.push_str(r"\\"),
                '"' => grammar.push_str("\\\""),
                '\n' => grammar.push_str(r"\n"),
                '\r' => grammar.push_str(r"\r"),
                '\t' => grammar.push_str(r"\t"),
                control if control.is_ascii_control() => {
                    grammar.push_str(&format!("\\u{:04x}", u32::from(control)));
                }
                other => grammar.push(other),
            }
        }
        grammar.push('"');
    }
    grammar
}

/// String formats that xgrammar knows (`STRING_SUPPORTED_FORMATS`, backend_xgrammar.py).
const STRING_FORMATS: [&str; 14] = [
    "email",
    "date",
    "time",
    "date-time",
    "duration",
    "ipv4",
    "ipv6",
    "hostname",
    "uuid",
    "uri",
    "uri-reference",
    "uri-template",
    "json-pointer",
    "relative-json-pointer",
];

/// Returns the keyword of a schema that xgrammar would ignore, by the rules of vLLM 0.33's
/// `has_xgrammar_unsupported_json_features`.
fn unsupported_by_xgrammar(schema: &Value) -> Option<&'static str> {
    let object = schema.as_object()?;
    let has = |key: &str| object.contains_key(key);
    let is = |wanted: &str| match object.get("type") {
        Some(Value::String(name)) => name == wanted,
        Some(Value::Array(names)) => names.iter().any(|name| name == wanted),
        _ => false,
    };
    let bounded_pattern = |value: &Value| {
        let has = |key: &str| value.get(key).is_some();
        (has("pattern") || has("format")) && (has("minLength") || has("maxLength"))
    };
    if (is("integer") || is("number")) && has("multipleOf") {
        return Some("`multipleOf`");
    }
    if is("array") {
        let keywords = [
            ("uniqueItems", "`uniqueItems`"),
            ("contains", "`contains`"),
            ("minContains", "`minContains`"),
            ("maxContains", "`maxContains`"),
        ];
        if let Some((_, name)) = keywords.iter().find(|(key, _)| has(key)) {
            return Some(name);
        }
    }
    if is("string") {
        if let Some(format) = object.get("format")
            && !STRING_FORMATS.iter().any(|known| format == known)
        {
            return Some("an unknown string `format`");
        }
        if bounded_pattern(schema) {
            return Some("a length bound beside `pattern` or `format`");
        }
    }
    if is("object") {
        if let Some(names) = object.get("propertyNames") {
            if bounded_pattern(names) {
                return Some("a length bound beside a pattern in `propertyNames`");
            }
            if has("patternProperties") || has("properties") {
                return Some("`propertyNames` beside properties");
            }
            if object
                .get("unevaluatedProperties")
                .is_some_and(|value| *value != Value::Bool(true))
            {
                return Some("`propertyNames` beside `unevaluatedProperties`");
            }
        }
        if let Some(Value::Object(patterns)) = object.get("patternProperties")
            && (has("properties") || patterns.len() > 1)
        {
            return Some("`patternProperties` beside properties");
        }
    }
    if let Some(Value::Array(branches)) = object.get("allOf")
        && branches.len() >= 2
    {
        return Some("`allOf` of several schemas");
    }
    object.values().find_map(|value| match value {
        Value::Object(_) => unsupported_by_xgrammar(value),
        Value::Array(items) => items.iter().find_map(unsupported_by_xgrammar),
        _ => None,
    })
}

fn invalid(message: impl Into<String>) -> Invalid {
    Invalid::new(FIELD, message)
}
