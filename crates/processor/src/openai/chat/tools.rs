//! Which tools a request offers, and what that means for the answer's form.
//!
//! As in vLLM 0.32 (`parser/abstract_parser.py`, `tool_parsers/utils.py`): a call that may happen is found in
//! the text by the model's tool parser. One that must happen is forced by a constraint: for models whose
//! form of calls is known here (`structural`) in that form, else as a JSON list of `{"name","parameters"}`, or
//! as the bare arguments of the one tool that was named.

use serde_json::{Map, Value, json};
use stator_common::proto::worker::structured_outputs::Constraint;

use super::structural::{self, Force};
use super::types::{Tool, ToolChoice};
use crate::openai::error::ApiError;

/// What a request wants of its tools.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) calls: Calls,
    pub(super) wish: Wish,
    /// What makes the model call.
    pub(super) constraint: Option<Constraint>,
}

/// How tool calls are told from the answer's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// There are none.
    None,
    /// By the model's tool parser.
    Parsed,
    /// The answer is the arguments of this tool.
    Named(String),
    /// The answer is a JSON list of calls.
    Listed,
}

/// Whether the model must call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// If it wants to.
    Auto,
    /// Any tool.
    Required,
    /// The tool that the request names.
    Named,
}

/// Returns the plan, after checking the tools.
///
/// - `parallel`: whether there may be several calls.
/// - `parser`: the model's tool parser.
///
/// # Errors
/// `tools` or `tool_choice` make no sense.
pub(super) fn plan(
    tools: Option<&[Tool]>,
    choice: Option<&ToolChoice>,
    parallel: bool,
    parser: Option<&str>,
) -> Result<Plan, ApiError> {
    let none = Plan {
        calls: Calls::None,
        wish: Wish::Auto,
        constraint: None,
    };
    let Some(tools) = tools else {
        return match choice {
            None | Some(ToolChoice::None) => Ok(none),
            Some(_) => Err(ApiError::invalid(
                "tool_choice",
                "tool_choice needs tools to be set",
            )),
        };
    };
    check(tools)?;
    let style = parser.and_then(structural::style);
    let (wish, offered) = match choice {
        Some(ToolChoice::None) => return Ok(none),
        None | Some(ToolChoice::Auto) if parser.is_none() => {
            let message = "tool_choice 'auto' needs the model to be served with \
                           --enable-auto-tool-choice and --tool-call-parser";
            return Err(ApiError::invalid("tool_choice", message));
        }
        None | Some(ToolChoice::Auto) => (Wish::Auto, tools),
        Some(ToolChoice::Required) => (Wish::Required, tools),
        Some(ToolChoice::Named(name)) => (Wish::Named, std::slice::from_ref(named(tools, name)?)),
    };
    if let Some(style) = style {
        let force = match wish {
            Wish::Auto => {
                let strict = offered
                    .iter()
                    .any(|tool| tool.function.strict == Some(true));
                (strict || !parallel).then_some(Force::No)
            }
            Wish::Required | Wish::Named => Some(Force::Yes),
        };
        let single = !parallel || wish == Wish::Named;
        let constraint = force.map(|force| {
            Constraint::StructuralTag(structural::tag(style, offered, force, single).to_string())
        });
        return Ok(Plan {
            calls: Calls::Parsed,
            wish,
            constraint,
        });
    }
    let (calls, schema) = match wish {
        Wish::Auto => {
            return Ok(Plan {
                calls: Calls::Parsed,
                wish,
                constraint: None,
            });
        }
        Wish::Required => (Calls::Listed, list_schema(tools, parallel)?),
        Wish::Named => (
            Calls::Named(offered[0].function.name.clone()),
            parameters(&offered[0]).into(),
        ),
    };
    Ok(Plan {
        calls,
        wish,
        constraint: Some(Constraint::Json(schema.to_string())),
    })
}

fn check(tools: &[Tool]) -> Result<(), ApiError> {
    if tools.is_empty() {
        return Err(ApiError::invalid(
            "tools",
            "tools must not be an empty list; leave it out instead",
        ));
    }
    for (i, tool) in tools.iter().enumerate() {
        if tool
            .r#type
            .as_deref()
            .is_some_and(|kind| kind != "function")
        {
            let message = "only tools of type 'function' are supported";
            return Err(ApiError::invalid(format!("tools[{i}].type"), message));
        }
    }
    Ok(())
}

fn named<'a>(tools: &'a [Tool], name: &str) -> Result<&'a Tool, ApiError> {
    tools
        .iter()
        .find(|tool| tool.function.name == name)
        .ok_or_else(|| {
            let message = format!("tool_choice names '{name}', which is not among the tools");
            ApiError::invalid("tool_choice", message)
        })
}

fn list_schema(tools: &[Tool], parallel: bool) -> Result<Value, ApiError> {
    let mut definitions = Map::new();
    let mut calls = Vec::with_capacity(tools.len());
    for (i, tool) in tools.iter().enumerate() {
        let mut parameters = parameters(tool);
        // References start at the root of the whole schema, so definitions must move there.
        if let Some(Value::Object(own)) = parameters.remove("$defs") {
            for (name, definition) in own {
                match definitions.get(&name) {
                    Some(known) if *known != definition => {
                        let message = format!("the definition '{name}' has several schemas");
                        return Err(ApiError::invalid(
                            format!("tools[{i}].function.parameters"),
                            message,
                        ));
                    }
                    _ => drop(definitions.insert(name, definition)),
                }
            }
        }
        calls.push(json!({
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                "parameters": parameters,
            },
            "required": ["name", "parameters"],
        }));
    }
    let mut schema = json!({
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "anyOf": calls},
    });
    if !parallel {
        schema["maxItems"] = 1.into();
    }
    if !definitions.is_empty() {
        schema["$defs"] = definitions.into();
    }
    Ok(schema)
}

fn parameters(tool: &Tool) -> Map<String, Value> {
    match &tool.function.parameters {
        Some(parameters) if !parameters.is_empty() => parameters.clone(),
        _ => {
            let mut schema = Map::new();
            schema.insert("type".to_owned(), "object".into());
            schema.insert("properties".to_owned(), Map::new().into());
            schema
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(json: Value) -> Vec<Tool> {
        serde_json::from_value(json).unwrap()
    }

    fn two_tools() -> Vec<Tool> {
        tools(json!([
            {"type": "function", "function": {"name": "add", "parameters": {
                "type": "object", "properties": {"a": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"type": "integer"}}}}},
            {"type": "function", "function": {"name": "stop"}},
        ]))
    }

    fn plan_of(choice: Option<&ToolChoice>, parser: Option<&str>) -> Result<Plan, ApiError> {
        plan(Some(&two_tools()), choice, true, parser)
    }

    #[test]
    fn tools_are_offered_unless_the_request_says_otherwise() {
        let calls = |choice| plan_of(choice, Some("json")).unwrap().calls;
        assert_eq!(calls(None), Calls::Parsed);
        assert_eq!(calls(Some(&ToolChoice::None)), Calls::None);
        assert_eq!(calls(Some(&ToolChoice::Required)), Calls::Listed);
        let named = |name: &str| ToolChoice::Named(name.to_owned());
        assert_eq!(calls(Some(&named("stop"))), Calls::Named("stop".to_owned()));
        assert_eq!(
            plan_of(Some(&named("go")), None).unwrap_err().param(),
            Some("tool_choice")
        );
    }

    #[test]
    fn a_call_that_may_happen_needs_a_parser_and_one_that_must_needs_none() {
        assert_eq!(
            plan_of(None, None).unwrap_err().param(),
            Some("tool_choice")
        );
        assert!(plan_of(Some(&ToolChoice::Required), None).is_ok());
    }

    #[test]
    fn a_call_is_forced_in_the_models_own_form_where_that_is_known() {
        let forced = plan_of(Some(&ToolChoice::Required), Some("hermes")).unwrap();
        assert_eq!(forced.calls, Calls::Parsed);
        assert!(matches!(
            forced.constraint,
            Some(Constraint::StructuralTag(_))
        ));
        let free = plan_of(None, Some("hermes")).unwrap();
        assert_eq!((free.calls, free.constraint), (Calls::Parsed, None));
    }

    #[test]
    fn a_list_of_calls_has_its_definitions_at_the_root() {
        let schema = list_schema(&two_tools(), false).unwrap();
        assert_eq!(schema["$defs"]["N"]["type"], "integer");
        assert_eq!(schema["maxItems"], 1);
        let calls = schema["items"]["anyOf"].as_array().unwrap();
        assert_eq!(calls[0]["properties"]["name"]["enum"], json!(["add"]));
        assert!(calls[0]["properties"]["parameters"].get("$defs").is_none());
        assert_eq!(calls[1]["properties"]["parameters"]["type"], "object");
    }

    #[test]
    fn tools_that_make_no_sense_are_refused_by_name() {
        let tool = |kind| json!({"function": {"name": kind, "parameters": {"$defs": {"N": {"type": kind}}}}});
        for (list, param) in [
            (json!([]), "tools"),
            (
                json!([{"type": "retrieval", "function": {"name": "x"}}]),
                "tools[0].type",
            ),
            (
                json!([tool("a"), tool("b")]),
                "tools[1].function.parameters",
            ),
        ] {
            let error =
                plan(Some(&tools(list)), Some(&ToolChoice::Required), true, None).unwrap_err();
            assert_eq!(error.param(), Some(param));
        }
        let error = plan(None, Some(&ToolChoice::Auto), true, None).unwrap_err();
        assert_eq!(error.param(), Some("tool_choice"));
    }
}
