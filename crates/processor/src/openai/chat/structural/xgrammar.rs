//! What of a JSON schema xgrammar does not hold an answer to.
//!
//! By the rules of vLLM 0.32 (`backend_xgrammar.py`, `has_xgrammar_unsupported_json_features`). The engine checks
//! the same of a schema that stands alone; of one within a structural tag it does not.

use serde_json::{Map, Value};

/// String formats that it knows (`STRING_SUPPORTED_FORMATS`).
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

/// Says whether part of a schema would be ignored.
pub(super) fn ignores_part_of(schema: &Value) -> bool {
    let Some(object) = schema.as_object() else {
        return false;
    };
    let is = |wanted: &str| match object.get("type") {
        Some(Value::String(kind)) => kind == wanted,
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == wanted),
        _ => false,
    };
    let number = (is("integer") || is("number")) && object.contains_key("multipleOf");
    let list = ["uniqueItems", "contains", "minContains", "maxContains"];
    let list = is("array") && list.iter().any(|key| object.contains_key(*key));
    let branches = object.get("allOf").and_then(Value::as_array);
    number
        || list
        || (is("string") && (has_unknown_format(object) || has_bounded_pattern(object)))
        || (is("object") && (names_are_bounded(object) || patterns_are_mixed(object)))
        || branches.is_some_and(|branches| branches.len() > 1)
        || object.values().any(|value| match value {
            Value::Array(items) => items.iter().any(ignores_part_of),
            other => ignores_part_of(other),
        })
}

fn has_unknown_format(string: &Map<String, Value>) -> bool {
    let known = |format: &Value| STRING_FORMATS.iter().any(|known| format == known);
    string.get("format").is_some_and(|format| !known(format))
}

fn has_bounded_pattern(string: &Map<String, Value>) -> bool {
    let has = |key: &str| string.contains_key(key);
    (has("pattern") || has("format")) && (has("minLength") || has("maxLength"))
}

fn names_are_bounded(object: &Map<String, Value>) -> bool {
    let Some(names) = object.get("propertyNames") else {
        return false;
    };
    let has = |key: &str| object.contains_key(key);
    let unevaluated = object.get("unevaluatedProperties");
    names.as_object().is_some_and(has_bounded_pattern)
        || has("patternProperties")
        || has("properties")
        || unevaluated.is_some_and(|allowed| *allowed != Value::Bool(true))
}

fn patterns_are_mixed(object: &Map<String, Value>) -> bool {
    let patterns = object.get("patternProperties").and_then(Value::as_object);
    patterns.is_some_and(|patterns| patterns.len() > 1 || object.contains_key("properties"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_is_ignored_is_found_however_deep() {
        let ignored = [
            json!({"type": "integer", "multipleOf": 3}),
            json!({"type": ["array", "null"], "uniqueItems": true}),
            json!({"type": "string", "format": "phone"}),
            json!({"type": "string", "pattern": "a", "maxLength": 3}),
            json!({"type": "object", "propertyNames": {"pattern": "a", "minLength": 1}}),
            json!({"type": "object", "propertyNames": {}, "properties": {}}),
            json!({"type": "object", "propertyNames": {}, "unevaluatedProperties": false}),
            json!({"type": "object", "patternProperties": {"a": {}, "b": {}}}),
            json!({"allOf": [{}, {}]}),
        ];
        for schema in ignored {
            assert!(ignores_part_of(&schema), "{schema}");
            assert!(ignores_part_of(&json!({"anyOf": [{"items": schema}]})));
        }
        for schema in [
            json!(true),
            json!({"multipleOf": 3}),
            json!({"type": "string", "format": "date"}),
            json!({"type": "object", "patternProperties": {"a": {}}}),
            json!({"allOf": [{}]}),
        ] {
            assert!(!ignores_part_of(&schema), "{schema}");
        }
    }
}
