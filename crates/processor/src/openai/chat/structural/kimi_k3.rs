//! The form of Kimi K3: channels for the response and for tools, an element per argument.
//!
//! A string stands in its element as it is, everything else as JSON; an argument whose type is not one of JSON's
//! may be written in any way.

use serde_json::{Map, Value};

use super::formats::{
    Count, any_text, one_of, optional, plus, regex, schema, separated, sequence, star, tag, text,
};
use super::schema_of;
use crate::openai::chat::types::Tool;

const OPEN: &str = "<|open|>";
const CLOSE: &str = "<|close|>";
const ARGUMENT_END: &str = "<|close|>argument<|sep|>";
/// A character of a string, but for the start of a marker.
const CHARACTER: &str = "(?:[^<]|<[^|])";
/// The longest bound on a string that becomes part of the grammar.
const LONGEST: u64 = 4096;
/// The most choices that do.
const MOST_CHOICES: usize = 256;

/// The response comes first, then the calls. The form is the same whether they may come or must, but for
/// [`optional_calls`].
pub(super) fn format(tools: &[Tool], force: super::Force, single: bool) -> Value {
    let calls: Vec<Value> = tools.iter().map(call).collect();
    let list = separated(&calls, "", Count::Some.bounded(single));
    let channel = tag("<|open|>tools<|sep|>", &list, "<|close|>tools<|sep|>");
    sequence(&[
        optional(&text("<|open|>response<|sep|>")),
        tag(
            "",
            &any_text(&[OPEN, CLOSE, "<|end_of_msg|>"]),
            "<|close|>response<|sep|>",
        ),
        match force {
            super::Force::No => optional(&channel),
            super::Force::Any | super::Force::One => channel,
        },
        optional(&text("<|close|>message<|sep|>")),
    ])
}

fn call(tool: &Tool) -> Value {
    let begin = format!(
        "<|open|>call tool=\"{}\" index=\"",
        escaped(&tool.function.name)
    );
    let content = sequence(&[
        regex("[0-9]+"),
        text("\"<|sep|>"),
        arguments(&schema_of(tool)),
    ]);
    tag(&begin, &content, "<|close|>call<|sep|>")
}

fn arguments(parameters: &Value) -> Value {
    let properties = parameters.get("properties").and_then(Value::as_object);
    let Some(properties) = properties.filter(|properties| !properties.is_empty()) else {
        return star(&any_argument());
    };
    let written = properties
        .iter()
        .map(|(key, property)| argument(key, property, parameters).unwrap_or_else(any_argument));
    let written = one_of(written.collect());
    let required = parameters.get("required").and_then(Value::as_array);
    match required.is_some_and(|required| !required.is_empty()) {
        true => plus(&written),
        false => star(&written),
    }
}

/// An argument of any name and type.
fn any_argument() -> Value {
    let content = sequence(&[regex(r"[^<]*<\|sep\|>"), any_text(&[CLOSE])]);
    tag("<|open|>argument ", &content, ARGUMENT_END)
}

/// Returns the element of one argument; `None` if its type is not known.
///
/// - `root`: the schema of all of them, whose definitions the property may refer to.
fn argument(key: &str, property: &Value, root: &Value) -> Option<Value> {
    let kind = match property.get("type")?.as_str()? {
        "integer" => "number",
        kind @ ("string" | "number" | "boolean" | "null" | "object" | "array") => kind,
        _ => return None,
    };
    let begin = format!(
        "<|open|>argument key=\"{}\" type=\"{kind}\"<|sep|>",
        escaped(key)
    );
    let content = if kind == "string" {
        string(property)
    } else {
        schema(&with_definitions(property, root), "json")
    };
    Some(tag(&begin, &content, ARGUMENT_END))
}

fn string(property: &Value) -> Value {
    if let Some(choices) = choices(property) {
        return one_of(choices.into_iter().map(text).collect());
    }
    let length = |name: &str| property.get(name).and_then(Value::as_u64);
    match length("maxLength").filter(|most| *most <= LONGEST) {
        Some(most) => {
            let least = length("minLength")
                .filter(|least| *least <= most)
                .unwrap_or(0);
            regex(&format!("{CHARACTER}{{{least},{most}}}"))
        }
        None => any_text(&[CLOSE]),
    }
}

/// Returns the strings that a property may be, where that is a list that a grammar can hold.
fn choices(property: &Value) -> Option<Vec<&str>> {
    let choices: Vec<&Value> = match property.get("enum") {
        None | Some(Value::Null) => vec![property.get("const").filter(|fixed| fixed.is_string())?],
        Some(listed) => listed.as_array()?.iter().collect(),
    };
    let texts: Option<Vec<&str>> = choices.into_iter().map(Value::as_str).collect();
    texts.filter(|texts| {
        (1..=MOST_CHOICES).contains(&texts.len()) && !texts.iter().any(|text| text.contains("<|"))
    })
}

fn with_definitions(property: &Value, root: &Value) -> Value {
    let mut whole: Map<String, Value> = property.as_object().cloned().unwrap_or_default();
    for name in ["$defs", "definitions"] {
        if let Some(definitions @ Value::Object(_)) = root.get(name) {
            whole.entry(name).or_insert_with(|| definitions.clone());
        }
    }
    Value::Object(whole)
}

fn escaped(name: &str) -> String {
    name.replace('&', "&amp;").replace('"', "&quot;")
}
