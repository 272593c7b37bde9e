//! The form of GLM 4.5 to 4.7: `<tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>..</tool_call>`.
//!
//! Strings stand in a value as they are, everything else as JSON. For a tool that is not strict, the names of the
//! arguments are held to and their types in outline, if its schema is a plain one.

use serde_json::{Map, Value, json};

use super::formats::{
    Count, any_text, one_of, schema, separated, sequence, star, tag, text, triggered,
};
use super::{Force, is_strict, schema_of};
use crate::openai::chat::types::Tool;
use stator_text::python_json;

/// What may not come within a value.
const MARKERS: [&str; 8] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
];
const BEGIN: &str = "<tool_call>";
const END: &str = "</tool_call>";
/// Keys of a schema that say more of an object than its properties do.
const NOT_PLAIN: [&str; 5] = ["$ref", "allOf", "anyOf", "oneOf", "patternProperties"];

pub(super) fn format(tools: &[Tool], force: Force, single: bool) -> Value {
    let calls: Vec<Value> = tools.iter().map(call).collect();
    let all_strict = tools.iter().all(is_strict);
    // Text may begin a call, so that marker may come.
    let excludes: Vec<&str> = MARKERS
        .into_iter()
        .filter(|marker| *marker != BEGIN)
        .collect();
    let some = Count::Some.bounded(single);
    match force {
        Force::No => triggered(BEGIN, &calls, Count::Any.bounded(single), &excludes),
        // Strict tools take another way through vLLM, where text may come first.
        Force::Any if all_strict => triggered(BEGIN, &calls, some, &excludes),
        Force::Any => separated(&calls, "", some),
        Force::One if all_strict => calls.into_iter().next().unwrap_or_default(),
        Force::One => separated(&calls, "", Count::One),
    }
}

fn call(tool: &Tool) -> Value {
    let begin = format!("{BEGIN}{}", tool.function.name);
    let plain = tool.function.parameters.as_ref().and_then(plain_properties);
    match plain {
        Some(properties) if !is_strict(tool) => {
            let pairs = properties.iter().map(|(key, property)| {
                let key = text(&format!("<arg_key>{key}</arg_key><arg_value>"));
                sequence(&[key, value(property), text("</arg_value>")])
            });
            tag(&begin, &star(&one_of(pairs.collect())), END)
        }
        _ => tag(&begin, &schema(&schema_of(tool), "glm_xml"), END),
    }
}

/// Returns the properties of a schema that is plain: an object with these properties and no others.
fn plain_properties(parameters: &Map<String, Value>) -> Option<&Map<String, Value>> {
    let properties = parameters.get("properties")?.as_object()?;
    let plain = !properties.is_empty()
        && parameters.get("additionalProperties") != Some(&Value::Bool(true))
        && !NOT_PLAIN.iter().any(|key| parameters.contains_key(*key));
    plain.then_some(properties)
}

/// What may stand in the value of a property.
fn value(property: &Value) -> Value {
    if let Some(Value::Array(choices)) = property.get("enum") {
        let written = choices.iter().map(|choice| match choice {
            Value::String(choice) => text(choice),
            other => {
                let other = other.to_string();
                text(&python_json::rewrite(&other).unwrap_or(other))
            }
        });
        return one_of(written.collect());
    }
    match property.get("type") {
        Some(Value::Array(kinds)) => {
            let is_text = |kind: &&Value| *kind == "string";
            let others = kinds.iter().filter(|kind| !is_text(kind));
            let mut written: Vec<Value> =
                others.map(|kind| value(&json!({"type": kind}))).collect();
            if kinds.iter().any(|kind| is_text(&kind)) {
                written.push(any_text(&MARKERS));
            }
            one_of(written)
        }
        None | Some(Value::Null) => any_text(&MARKERS),
        Some(kind) if kind == "string" => any_text(&MARKERS),
        Some(kind) => schema(&json!({"type": kind}), "json"),
    }
}
