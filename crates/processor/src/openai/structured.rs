//! The one constraint on the form of an answer, from the several ways to ask for it.
//!
//! Checks what can be told without compiling a grammar; the engine compiles it and may still refuse.
//! Limits are vLLM's (0.32, `sampling_params.py`).

use serde_json::Value;
use stator_common::proto::worker::structured_outputs::Constraint;
use stator_common::proto::worker::{StringList, StructuredOutputs};

use crate::openai::error::ApiError;
use crate::openai::request::{ResponseFormat, Shared};

/// Levels of objects and arrays that a schema may nest (vLLM's `MAX_STRUCTURED_OUTPUT_JSON_NESTING`).
const MAX_NESTING: usize = 64;
/// Bytes of a constraint: no grammar compiler is done with more in a time that anybody would wait.
const MAX_BYTES: usize = 1 << 20;
/// Further levels that a structural tag may add around its schemas (`STRUCTURAL_TAG_WRAPPER_NESTING`).
const TAG_NESTING: usize = 16;

/// Returns the constraint that a request asks for, or `None`.
///
/// `response_format` wins over `structured_outputs` when both are given and agree in kind; two kinds at
/// once are refused.
///
/// # Errors
/// [`Code::InvalidRequest`](stator_common::Code::InvalidRequest), naming the field.
pub(crate) fn constraint(shared: &Shared) -> Result<Option<StructuredOutputs>, ApiError> {
    let mut found = Found::default();
    let options = shared.structured_outputs.as_ref();
    if let Some(options) = options {
        let name = "structured_outputs";
        if options.json_object == Some(false) {
            return Err(ApiError::invalid(
                name,
                "json_object must be true if it is set",
            ));
        }
        found.add(
            name,
            options
                .json
                .as_ref()
                .map(|json| Constraint::Json(json.0.clone())),
        )?;
        found.add(name, options.regex.clone().map(Constraint::Regex))?;
        found.add(name, options.choice.clone().map(choice))?;
        found.add(name, options.grammar.clone().map(Constraint::Grammar))?;
        found.add(name, options.json_object.map(Constraint::JsonObject))?;
        found.add(
            name,
            options
                .structural_tag
                .as_ref()
                .map(|tag| Constraint::StructuralTag(tag.0.clone())),
        )?;
        if found.0.is_none() {
            return Err(ApiError::invalid(
                name,
                "one kind of constraint must be set, none is",
            ));
        }
    }
    found.add(
        "guided_json",
        shared
            .guided_json
            .as_ref()
            .map(|json| Constraint::Json(json.0.clone())),
    )?;
    found.add(
        "guided_regex",
        shared.guided_regex.clone().map(Constraint::Regex),
    )?;
    found.add("guided_choice", shared.guided_choice.clone().map(choice))?;
    found.add(
        "guided_grammar",
        shared.guided_grammar.clone().map(Constraint::Grammar),
    )?;
    let name = "response_format";
    match &shared.response_format {
        None | Some(ResponseFormat::Text) => {}
        Some(ResponseFormat::JsonObject) => found.add(name, Some(Constraint::JsonObject(true)))?,
        Some(ResponseFormat::JsonSchema(schema)) => {
            found.add(name, Some(Constraint::Json(schema.clone())))?;
        }
        Some(ResponseFormat::StructuralTag(tag)) => {
            found.add(name, Some(Constraint::StructuralTag(tag.clone())))?;
        }
    }
    let Some((name, constraint)) = found.0 else {
        return Ok(None);
    };
    let pattern = options.and_then(|options| options.whitespace_pattern.as_ref());
    check_size(name, &constraint, pattern.map_or(0, String::len))?;
    check(name, &constraint)?;
    Ok(Some(StructuredOutputs {
        constraint: Some(constraint),
        disable_any_whitespace: options
            .and_then(|o| o.disable_any_whitespace)
            .unwrap_or(false),
        disable_additional_properties: options
            .and_then(|o| o.disable_additional_properties)
            .unwrap_or(false),
        whitespace_pattern: options
            .and_then(|o| o.whitespace_pattern.clone())
            .unwrap_or_default(),
    }))
}

/// Returns the field that a constraint came from, to be named when the engine cannot compile it.
pub(crate) fn field(shared: &Shared) -> &'static str {
    match &shared.response_format {
        Some(format) if *format != ResponseFormat::Text => "response_format",
        _ if shared.structured_outputs.is_some() => "structured_outputs",
        _ if shared.guided_json.is_some() => "guided_json",
        _ if shared.guided_regex.is_some() => "guided_regex",
        _ if shared.guided_choice.is_some() => "guided_choice",
        _ if shared.guided_grammar.is_some() => "guided_grammar",
        _ => "tools",
    }
}

/// The constraint found so far, with the field that it came from.
#[derive(Default)]
struct Found(Option<(&'static str, Constraint)>);

impl Found {
    fn add(&mut self, name: &'static str, new: Option<Constraint>) -> Result<(), ApiError> {
        let Some(new) = new else { return Ok(()) };
        match &self.0 {
            Some((first, old)) if std::mem::discriminant(old) != std::mem::discriminant(&new) => {
                let message = if *first == name {
                    format!("{name}: only one kind of constraint can be used")
                } else {
                    format!("{name} and {first}: only one kind of constraint can be used")
                };
                Err(ApiError::invalid(name, message))
            }
            _ => {
                self.0 = Some((name, new));
                Ok(())
            }
        }
    }
}

fn choice(values: Vec<String>) -> Constraint {
    Constraint::Choice(StringList { values })
}

/// Refuses a constraint that is too large, with `more` bytes that go with it.
///
/// # Errors
/// [`Code::InvalidRequest`](stator_common::Code::InvalidRequest), naming the field.
pub(crate) fn check_size(
    name: &'static str,
    constraint: &Constraint,
    more: usize,
) -> Result<(), ApiError> {
    let bytes = size(constraint) + more;
    if bytes <= MAX_BYTES {
        return Ok(());
    }
    let message = format!("{name}: a constraint can have {MAX_BYTES} bytes at most, got {bytes}");
    Err(ApiError::invalid(name, message))
}

/// Returns the bytes of a constraint.
pub(crate) fn size(constraint: &Constraint) -> usize {
    match constraint {
        Constraint::Json(text)
        | Constraint::Regex(text)
        | Constraint::Grammar(text)
        | Constraint::StructuralTag(text) => text.len(),
        // A string in a list has a head of its own in memory.
        Constraint::Choice(StringList { values }) => values
            .iter()
            .map(|value| value.len() + size_of::<String>())
            .sum(),
        Constraint::JsonObject(_) => 0,
    }
}

fn check(name: &'static str, constraint: &Constraint) -> Result<(), ApiError> {
    let invalid = |message: &str| Err(ApiError::invalid(name, format!("{name}: {message}")));
    match constraint {
        Constraint::Json(schema) => {
            let Ok(schema) = serde_json::from_str::<Value>(schema) else {
                return invalid("the schema is not valid JSON");
            };
            if !matches!(schema, Value::Object(_) | Value::Bool(_)) {
                return invalid("the schema is not a JSON object");
            }
            if nests_deeper(&schema, MAX_NESTING) {
                return invalid(
                    "the schema is nested too deeply, objects and arrays may nest 64 levels",
                );
            }
        }
        Constraint::Regex(regex) if regex.contains('\0') => {
            return invalid("a regex cannot contain a NUL character");
        }
        Constraint::Choice(StringList { values }) if values.is_empty() => {
            return invalid("the list of choices is empty");
        }
        Constraint::Grammar(grammar) if grammar.trim().is_empty() => {
            return invalid("the grammar is empty");
        }
        Constraint::StructuralTag(tag) => {
            let Ok(tag) = serde_json::from_str::<Value>(tag) else {
                return invalid("the structural tag is not valid JSON");
            };
            let legacy = tag["structures"].is_array() && tag["triggers"].is_array();
            if !legacy && !tag["format"].is_object() {
                return invalid("a structural tag needs 'format', or 'structures' and 'triggers'");
            }
            if nests_deeper(&tag, MAX_NESTING + TAG_NESTING) {
                return invalid("the structural tag is nested too deeply");
            }
        }
        Constraint::Regex(_)
        | Constraint::Choice(_)
        | Constraint::Grammar(_)
        | Constraint::JsonObject(_) => {}
    }
    Ok(())
}

/// Says whether objects and arrays nest more than `limit` levels.
fn nests_deeper(value: &Value, limit: usize) -> bool {
    match value {
        Value::Array(items) => limit == 0 || items.iter().any(|item| nests_deeper(item, limit - 1)),
        Value::Object(fields) => {
            limit == 0 || fields.values().any(|field| nests_deeper(field, limit - 1))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::completions::CompletionRequest;
    use crate::openai::request::parse;

    fn constraint_of(body: &str) -> Result<Option<Constraint>, ApiError> {
        let request: CompletionRequest = parse(body.as_bytes())?;
        Ok(constraint(&request.shared)?.and_then(|outputs| outputs.constraint))
    }

    #[test]
    fn every_spelling_leads_to_the_same_constraint() {
        let schema = r#"{"type":"object"}"#;
        let json = Some(Constraint::Json(schema.to_owned()));
        for body in [
            format!(
                r#"{{"response_format":{{"type":"json_schema","json_schema":{{"name":"x","schema":{schema}}}}}}}"#
            ),
            format!(r#"{{"structured_outputs":{{"json":{schema}}}}}"#),
            r#"{"structured_outputs":{"json":"{\"type\":\"object\"}"}}"#.to_owned(),
            format!(r#"{{"guided_json":{schema}}}"#),
        ] {
            assert_eq!(constraint_of(&body).unwrap(), json, "{body}");
        }
        let choice = Some(choice(vec!["a".into(), "b".into()]));
        for body in [
            r#"{"guided_choice":["a","b"]}"#,
            r#"{"structured_outputs":{"choice":["a","b"]}}"#,
        ] {
            assert_eq!(constraint_of(body).unwrap(), choice, "{body}");
        }
        assert_eq!(
            constraint_of(r#"{"response_format":{"type":"json_object"}}"#).unwrap(),
            Some(Constraint::JsonObject(true))
        );
        assert_eq!(
            constraint_of(r#"{"response_format":{"type":"text"}}"#).unwrap(),
            None
        );
    }

    #[test]
    fn a_constraint_that_no_grammar_can_come_from_is_refused() {
        let deep = format!(
            r#"{{"guided_json":{}{}}}"#,
            r#"{"a":"#.repeat(65),
            "1".to_owned() + &"}".repeat(65)
        );
        for (body, param) in [
            (
                r#"{"response_format":{"type":"json_schema"}}"#,
                "response_format",
            ),
            (r#"{"response_format":{"type":"yaml"}}"#, "response_format"),
            (r#"{"response_format":"json"}"#, "response_format"),
            (
                r#"{"response_format":{"type":"structural_tag"}}"#,
                "response_format",
            ),
            (r#"{"structured_outputs":{}}"#, "structured_outputs"),
            (
                r#"{"structured_outputs":{"json_object":false}}"#,
                "structured_outputs",
            ),
            (
                r#"{"structured_outputs":{"regex":"a","choice":["b"]}}"#,
                "structured_outputs",
            ),
            (
                r#"{"structured_outputs":{"regex":1}}"#,
                "structured_outputs.regex",
            ),
            (r#"{"guided_json":"{"}"#, "guided_json"),
            (r#"{"guided_json":[1]}"#, "guided_json"),
            (r#"{"guided_choice":[]}"#, "guided_choice"),
            (r#"{"guided_grammar":" "}"#, "guided_grammar"),
            (r#"{"guided_regex":"a\u0000"}"#, "guided_regex"),
            (
                r#"{"guided_regex":"a","guided_choice":["b"]}"#,
                "guided_choice",
            ),
            (&deep, "guided_json"),
        ] {
            let error = constraint_of(body).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}: {error}");
        }
    }
}
