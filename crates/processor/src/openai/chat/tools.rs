//! Which tools a request offers, and what that means for the answer's form.
//!
//! As in vLLM 0.32 (`parser/abstract_parser.py`, `tool_parsers/utils.py`): a call that may happen is found in
//! the text by the model's tool parser. One that must happen is forced by a constraint: for models whose
//! form of calls is known here (`structural`) in that form, else as a JSON list of calls, or as the bare
//! arguments of the one tool that was named.

use serde_json::{Map, Value, json};
use stator_common::proto::worker::StructuredOutputs;
use stator_common::proto::worker::structured_outputs::Constraint;

use super::structural::{self, Force, Form, Own};
use super::types::{Tool, ToolChoice};
use crate::openai::error::ApiError;
use crate::openai::request::{ResponseFormat, Shared};

/// What a request wants of its tools.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) calls: Calls,
    pub(super) wish: Wish,
    pub(super) hold: Hold,
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
    /// The answer is a JSON list of calls, with the arguments under this key.
    Listed(&'static str),
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

/// What the tools make of the constraint that the request itself asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Hold {
    /// It stays as it is.
    AsAsked,
    /// It gives way to this one.
    To(Constraint),
    /// It stays as it is; if there is none, this one holds.
    OrElse(Constraint),
    /// Calls in this form are allowed beside it.
    Beside {
        own: Own,
        tools: Vec<Tool>,
        single: bool,
        /// What holds if there is none.
        alone: Option<Constraint>,
    },
}

impl Hold {
    /// Returns the constraint that goes to the engine.
    pub(super) fn apply(self, asked: Option<StructuredOutputs>) -> Option<StructuredOutputs> {
        let only = |constraint| StructuredOutputs {
            constraint: Some(constraint),
            ..Default::default()
        };
        match (self, asked) {
            (Self::To(constraint), _) | (Self::OrElse(constraint), None) => Some(only(constraint)),
            (Self::AsAsked | Self::OrElse(_), asked) => asked,
            (Self::Beside { alone, .. }, None) => alone.map(only),
            (
                Self::Beside {
                    own, tools, single, ..
                },
                Some(asked),
            ) => {
                let constraint = asked.constraint.as_ref();
                let both = constraint
                    .and_then(|constraint| structural::either(own, &tools, single, constraint));
                Some(both.map_or(asked, |both| {
                    only(Constraint::StructuralTag(both.to_string()))
                }))
            }
        }
    }
}

/// What a request asks of its answer's form, as far as forced calls do not always win over it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    /// By `structured_outputs`, or by the older names of its fields.
    outputs: bool,
    /// By a structural tag there.
    outputs_tag: bool,
    /// By a structural tag as `response_format`.
    format_tag: bool,
}

impl Asked {
    pub(super) fn of(shared: &Shared) -> Self {
        let outputs = shared.structured_outputs.as_ref();
        Self {
            outputs: outputs.is_some()
                || shared.guided_json.is_some()
                || shared.guided_regex.is_some()
                || shared.guided_choice.is_some()
                || shared.guided_grammar.is_some(),
            outputs_tag: outputs.is_some_and(|outputs| outputs.structural_tag.is_some()),
            format_tag: matches!(
                shared.response_format,
                Some(ResponseFormat::StructuralTag(_))
            ),
        }
    }
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
    asked: Asked,
) -> Result<Plan, ApiError> {
    let none = Plan {
        calls: Calls::None,
        wish: Wish::Auto,
        hold: Hold::AsAsked,
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
    let form = structural::form(parser);
    let (wish, offered) = match choice {
        Some(ToolChoice::None) => return Ok(none),
        None | Some(ToolChoice::Auto) if parser.is_none() => {
            let message = "tool_choice 'auto' needs the model to be served with \
                           --enable-auto-tool-choice and --tool-call-parser";
            return Err(ApiError::invalid("tool_choice", message));
        }
        None | Some(ToolChoice::Auto) => {
            return Ok(Plan {
                calls: Calls::Parsed,
                wish: Wish::Auto,
                hold: allowed(form, tools, parallel),
            });
        }
        Some(ToolChoice::Required) => (Wish::Required, tools),
        Some(ToolChoice::Named(name)) => (Wish::Named, std::slice::from_ref(named(tools, name)?)),
    };
    let (calls, hold) = match form {
        Form::Unforced => (Calls::Parsed, Hold::AsAsked),
        Form::Own(own) => {
            let force = match wish {
                Wish::Named => Force::One,
                Wish::Required | Wish::Auto => Force::Any,
            };
            let tag = own.tag(offered, force, !parallel);
            let constraint = Constraint::StructuralTag(tag.to_string());
            (Calls::Parsed, Hold::To(constraint))
        }
        Form::Json => {
            let (calls, schema) = match wish {
                Wish::Named => {
                    let name = offered[0].function.name.clone();
                    (Calls::Named(name), parameters(&offered[0]).into())
                }
                Wish::Required | Wish::Auto => {
                    (Calls::Listed("parameters"), list_schema(tools, parallel)?)
                }
            };
            let hold = match asked.outputs_tag {
                true => Hold::AsAsked,
                false => Hold::To(Constraint::Json(schema.to_string())),
            };
            (calls, hold)
        }
        Form::JsonList if asked.outputs || asked.format_tag => (Calls::Parsed, Hold::AsAsked),
        Form::JsonList => {
            let schema = mistral_schema(offered, wish == Wish::Named);
            let constraint = Constraint::Json(schema.to_string());
            (Calls::Listed("arguments"), Hold::To(constraint))
        }
    };
    Ok(Plan { calls, wish, hold })
}

/// Returns what holds where the model may call if it wants to.
fn allowed(form: Form, tools: &[Tool], parallel: bool) -> Hold {
    let Form::Own(own) = form else {
        return Hold::AsAsked;
    };
    let held = own.always() || tools.iter().any(structural::is_strict);
    let alone = ((held || !parallel) && !own.only_forced()).then(|| {
        let tag = own.tag(tools, Force::No, !parallel);
        Constraint::StructuralTag(tag.to_string())
    });
    match alone {
        alone if held => Hold::Beside {
            own,
            tools: tools.to_vec(),
            single: !parallel,
            alone,
        },
        Some(constraint) => Hold::OrElse(constraint),
        None => Hold::AsAsked,
    }
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

/// The list of calls that Mistral's models are held to.
fn mistral_schema(tools: &[Tool], single: bool) -> Value {
    let call = |tool: &Tool| {
        let arguments = match &tool.function.parameters {
            Some(parameters) if !parameters.is_empty() => Value::Object(parameters.clone()),
            _ => json!({"type": "object"}),
        };
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                "arguments": arguments,
            },
            "required": ["name", "arguments"],
        })
    };
    let calls: Vec<Value> = tools.iter().map(call).collect();
    let mut schema = json!({"type": "array", "minItems": 1});
    if single {
        schema["maxItems"] = 1.into();
    }
    schema["items"] = json!({"type": "object", "anyOf": calls});
    schema
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
mod tests;
