//! The parts of a structural tag, as xgrammar reads them.
//!
//! Written with all their fields, in the order in which vLLM 0.32 writes them (`xgrammar/structural_tag.py`).

use serde_json::{Value, json};

/// How often the calls of a list may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    /// As often as the model wants.
    Any,
    /// At least once.
    Some,
    /// Once or not at all.
    AtMostOne,
    /// Once.
    One,
}

impl Count {
    /// Returns the count that is also bounded by one, if `single` says so.
    pub(super) fn bounded(self, single: bool) -> Self {
        match self {
            Self::Any if single => Self::AtMostOne,
            Self::Some if single => Self::One,
            other => other,
        }
    }

    fn at_least_one(self) -> bool {
        matches!(self, Self::Some | Self::One)
    }

    fn stop_after_first(self) -> bool {
        matches!(self, Self::AtMostOne | Self::One)
    }
}

/// The whole tag.
pub(super) fn structural_tag(format: &Value) -> Value {
    json!({"type": "structural_tag", "format": format})
}

/// JSON of a schema, in a form: `json`, or the XML of some model.
pub(super) fn schema(schema: &Value, style: &str) -> Value {
    json!({
        "type": "json_schema",
        "json_schema": schema,
        "style": style,
        "any_order": false,
        "max_whitespace_cnt": null,
        "excludes": [],
    })
}

/// This text.
pub(super) fn text(value: &str) -> Value {
    json!({"type": "const_string", "value": value})
}

/// Any text without these.
pub(super) fn any_text(excludes: &[&str]) -> Value {
    json!({"type": "any_text", "excludes": excludes, "max_tokens": null, "max_chars": null})
}

/// What a regular expression matches.
pub(super) fn regex(pattern: &str) -> Value {
    json!({"type": "regex", "pattern": pattern})
}

/// What a grammar in EBNF derives.
pub(super) fn grammar(grammar: &str) -> Value {
    json!({"type": "grammar", "grammar": grammar})
}

/// Something between two texts.
pub(super) fn tag(begin: &str, content: &Value, end: &str) -> Value {
    json!({"type": "tag", "begin": begin, "content": content, "end": end})
}

/// One after the other.
pub(super) fn sequence(elements: &[Value]) -> Value {
    json!({"type": "sequence", "elements": elements})
}

/// One of these.
pub(super) fn or(elements: &[Value]) -> Value {
    json!({"type": "or", "elements": elements})
}

/// One of these, written without the choice where there is none.
pub(super) fn one_of(mut elements: Vec<Value>) -> Value {
    match elements.len() {
        1 => elements.remove(0),
        _ => or(&elements),
    }
}

/// Any number of times.
pub(super) fn star(content: &Value) -> Value {
    json!({"type": "star", "content": content})
}

/// At least once.
pub(super) fn plus(content: &Value) -> Value {
    json!({"type": "plus", "content": content})
}

/// Once or not at all.
pub(super) fn optional(content: &Value) -> Value {
    json!({"type": "optional", "content": content})
}

/// Text without `excludes`, in which a trigger begins a tag.
pub(super) fn triggered(trigger: &str, tags: &[Value], count: Count, excludes: &[&str]) -> Value {
    json!({
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "at_least_one": count.at_least_one(),
        "stop_after_first": count.stop_after_first(),
        "excludes": excludes,
    })
}

/// Tags, and nothing but a separator between them.
pub(super) fn separated(tags: &[Value], separator: &str, count: Count) -> Value {
    json!({
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": count.at_least_one(),
        "stop_after_first": count.stop_after_first(),
    })
}
