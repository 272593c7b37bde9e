//! Structural tags that make a model call tools in its own form.
//!
//! The shape is that of vLLM 0.32 (`tool_parsers/structural_tag_registry.py`), whose grammars must be matched
//! for the same tokens to come out. Here are the forms that consist of a marker around a JSON object; a
//! model with another form is made to call by a JSON schema (`tools`).

use serde_json::{Value, json};

use super::types::Tool;

/// The markers around one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    begin: &'static str,
    end: &'static str,
}

/// Whether there must be a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Force {
    /// Text may come, and calls within it.
    No,
    /// Nothing but calls may come.
    Yes,
}

/// Returns how the models of a tool parser mark calls, where that is known.
pub(super) fn style(parser: &str) -> Option<Style> {
    match parser {
        "hermes" => Some(Style {
            begin: "<tool_call>",
            end: "</tool_call>",
        }),
        "longcat" => Some(Style {
            begin: "<longcat_tool_call>",
            end: "</longcat_tool_call>",
        }),
        _ => None,
    }
}

/// Returns the structural tag for calls of `tools`.
///
/// - `single`: no second call may follow.
///
/// Arguments are held to a tool's schema only if the tool is `strict`; else any JSON may come.
pub(super) fn tag(style: Style, tools: &[Tool], force: Force, single: bool) -> Value {
    let tags: Vec<Value> = tools.iter().flat_map(|tool| calls(style, tool)).collect();
    let format = match force {
        Force::Yes => json!({
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "",
            "at_least_one": true,
            "stop_after_first": single,
        }),
        Force::No => json!({
            "type": "triggered_tags",
            "triggers": [style.begin],
            "tags": tags,
            "at_least_one": false,
            "stop_after_first": single,
            "excludes": [],
        }),
    };
    json!({"type": "structural_tag", "format": format})
}

/// One call, with line breaks inside the markers and without.
fn calls(style: Style, tool: &Tool) -> [Value; 2] {
    let function = &tool.function;
    let schema = match &function.parameters {
        Some(parameters) if function.strict == Some(true) => Value::Object(parameters.clone()),
        _ => Value::Bool(true),
    };
    ["\n", ""].map(|line| {
        json!({
            "type": "tag",
            "begin": format!("{}{line}{{\"name\": \"{}\", \"arguments\": ", style.begin, function.name),
            "content": {
                "type": "json_schema",
                "json_schema": schema,
                "style": "json",
                "any_order": false,
                "max_whitespace_cnt": null,
                "excludes": [],
            },
            "end": format!("}}{line}{}", style.end),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_is_the_one_that_vllm_makes() {
        // vLLM 0.32.0: get_model_structural_tag("hermes", [this tool], "required", False).
        let expected = r#"{"type":"structural_tag","format":{"type":"tags_with_separator","tags":[{"type":"tag","begin":"<tool_call>\n{\"name\": \"b\", \"arguments\": ","content":{"type":"json_schema","json_schema":{"type":"object"},"style":"json","any_order":false,"max_whitespace_cnt":null,"excludes":[]},"end":"}\n</tool_call>"},{"type":"tag","begin":"<tool_call>{\"name\": \"b\", \"arguments\": ","content":{"type":"json_schema","json_schema":{"type":"object"},"style":"json","any_order":false,"max_whitespace_cnt":null,"excludes":[]},"end":"}</tool_call>"}],"separator":"","at_least_one":true,"stop_after_first":false}}"#;
        let tool =
            json!({"function": {"name": "b", "strict": true, "parameters": {"type": "object"}}});
        let tools: Vec<Tool> = serde_json::from_value(json!([tool])).unwrap();
        let style = style("hermes").unwrap();
        assert_eq!(tag(style, &tools, Force::Yes, false).to_string(), expected);
    }
}
