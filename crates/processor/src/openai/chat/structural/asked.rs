//! A call, or what the request itself asks of the answer's form.
//!
//! Where tools are held to their form and the request has a constraint of its own, vLLM 0.32 accepts either
//! (`parser/abstract_parser.py`, `structured_outputs_to_format`).

use serde_json::{Value, json};
use stator_common::proto::worker::structured_outputs::Constraint;

use super::formats::{grammar, or, regex, schema, structural_tag, tag, text};
use super::{Force, Own, xgrammar};
use crate::openai::chat::types::Tool;

/// Returns the structural tag for calls of `tools` or what `asked` says.
///
/// `None` where the second is nothing that xgrammar can hold an answer to: then it stands alone, for another
/// backend to take or to refuse.
pub(in crate::openai::chat) fn either(
    own: Own,
    tools: &[Tool],
    single: bool,
    asked: &Constraint,
) -> Option<Value> {
    // Text would make everything possible, so it has to be a call, or else the other.
    let calls = own.format(tools, Force::Any, single);
    Some(structural_tag(&or(&[calls, format(asked)?])))
}

fn format(asked: &Constraint) -> Option<Value> {
    Some(match asked {
        Constraint::JsonObject(_) => schema(&json!({"type": "object"}), "json"),
        Constraint::Json(json) => {
            let json: Value = serde_json::from_str(json).ok()?;
            if xgrammar::ignores_part_of(&json) {
                return None;
            }
            schema(&json, "json")
        }
        Constraint::Regex(pattern) => regex(pattern),
        Constraint::Choice(choices) => or(&choices
            .values
            .iter()
            .map(|choice| text(choice))
            .collect::<Vec<_>>()),
        // Lark's syntax would have to be translated.
        Constraint::Grammar(rules) if is_lark(rules) => return None,
        Constraint::Grammar(rules) => grammar(rules),
        Constraint::StructuralTag(asked) => {
            let asked: Value = serde_json::from_str(asked).ok()?;
            match asked["structures"].as_array() {
                Some(structures) => legacy(structures, &asked["triggers"])?,
                None => asked.get("format")?.clone(),
            }
        }
    })
}

/// The older kind of structural tag.
fn legacy(structures: &[Value], triggers: &Value) -> Option<Value> {
    let one = |structure: &Value| {
        let content = schema(structure.get("schema")?, "json");
        Some(tag(
            structure["begin"].as_str()?,
            &content,
            structure["end"].as_str()?,
        ))
    };
    let tags: Vec<Value> = structures.iter().map(one).collect::<Option<_>>()?;
    Some(json!({
        "type": "triggered_tags",
        "triggers": triggers,
        "tags": tags,
        "at_least_one": false,
        "stop_after_first": false,
        "excludes": [],
    }))
}

/// Says whether a grammar is written for Lark: it defines nothing the way EBNF does.
fn is_lark(rules: &str) -> bool {
    let code = |line: &str| {
        let end = ["#", "//"].iter().filter_map(|mark| line.find(mark)).min();
        line[..end.unwrap_or(line.len())].contains("::=")
    };
    !rules.lines().any(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grammar_for_lark_stands_alone() {
        assert!(is_lark("start: \"a\" // root ::= no"));
        assert!(!is_lark("# rules\nroot ::= \"a\""));
        assert_eq!(
            format(&Constraint::Grammar("start: \"a\"".to_owned())),
            None
        );
    }
}
