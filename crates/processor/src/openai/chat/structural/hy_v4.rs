//! The form of Hunyuan 4: names of tools and arguments are held to, values are free.
//!
//! Tokens of the checkpoints that have a suffix (`<tool_calls:6124c78e>`) are not known here.

use serde_json::{Map, Value};

use super::Force;
use super::formats::{Count, any_text, one_of, separated, sequence, star, tag, text, triggered};
use crate::openai::chat::types::Tool;

const BEGIN: &str = "<tool_calls>";
const END: &str = "</tool_calls>";

pub(super) fn format(tools: &[Tool], force: Force, single: bool) -> Value {
    let calls: Vec<Value> = tools.iter().map(call).collect();
    let some = Count::Some.bounded(single);
    match force {
        Force::No => {
            let section = tag(BEGIN, &separated(&calls, "", some), END);
            triggered(BEGIN, &[section], Count::Any.bounded(single), &[])
        }
        Force::Any => sequence(&[text(BEGIN), separated(&calls, "", some), text(END)]),
        Force::One => sequence(&[text(BEGIN), separated(&calls, "", Count::One), text(END)]),
    }
}

fn call(tool: &Tool) -> Value {
    let nothing = Map::new();
    let (required, optional) = keys(tool.function.parameters.as_ref().unwrap_or(&nothing));
    let mut elements: Vec<Value> = required.into_iter().map(argument).collect();
    if !optional.is_empty() {
        elements.push(star(&one_of(optional.into_iter().map(argument).collect())));
    }
    let content = match elements.is_empty() {
        true => any_text(&[]),
        false => sequence(&elements),
    };
    tag(
        &format!("<tool_call>{}", tool.function.name),
        &content,
        "</tool_call>",
    )
}

fn argument(key: &str) -> Value {
    sequence(&[
        text("<arg_key>"),
        text(key),
        text("</arg_key>"),
        text("<arg_value>"),
        any_text(&[]),
        text("</arg_value>"),
    ])
}

/// Returns the arguments that must come and those that may, each in the order of the schema.
fn keys(parameters: &Map<String, Value>) -> (Vec<&str>, Vec<&str>) {
    let properties = parameters.get("properties").and_then(Value::as_object);
    let declared: Vec<&str> = properties
        .into_iter()
        .flat_map(|properties| properties.keys().map(String::as_str))
        .collect();
    let required = parameters.get("required").and_then(Value::as_array);
    let required: Vec<&str> = required
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let (mut must, may): (Vec<_>, Vec<_>) = declared
        .iter()
        .copied()
        .partition(|key| required.contains(key));
    must.extend(required.into_iter().filter(|key| !declared.contains(key)));
    (must, may)
}
