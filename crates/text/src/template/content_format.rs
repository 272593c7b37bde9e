//! What a template expects as the content of a message: a string, or a list of parts.
//!
//! vLLM decides by reading the template (`renderers/hf.py::_detect_content_format`): one that loops over the content of
//! a message, directly or in a macro that gets it as an argument, expects parts. The same is done here, on
//! minijinja's syntax tree, which is walked as JSON: there, one search serves every kind of node.

use std::collections::BTreeSet;

use serde_json::Value;

use super::environment::syntax;

/// The form in which a template gets the content of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// One string; the texts of parts are joined by line breaks.
    String,
    /// A list of parts as in the OpenAI API, also for a content that came as a string.
    Parts,
}

/// Finds out what a template expects; one that does not parse expects strings.
pub(super) fn detect(source: &str) -> ContentFormat {
    let Ok(tree) = minijinja::machinery::parse(source, "chat", syntax()) else {
        return ContentFormat::String;
    };
    match serde_json::to_value(&tree) {
        Ok(tree) if loops_over_content(&tree) => ContentFormat::Parts,
        _ => ContentFormat::String,
    }
}

fn loops_over_content(tree: &Value) -> bool {
    let messages = message_variables(tree);
    let is_content = |node: &Value| {
        messages
            .iter()
            .any(|name| is_access(node, name, Some("content")))
    };
    let mut in_macros = BTreeSet::new();
    for macro_node in find(tree, "stmt", "Macro") {
        let parameters = content_parameters(tree, macro_node, &is_content);
        for for_loop in find(macro_node, "stmt", "ForLoop") {
            in_macros.insert(std::ptr::from_ref(for_loop));
            let iterated = &fields(for_loop)["iter"];
            if is_content(iterated)
                || parameters
                    .iter()
                    .any(|name| variable(iterated) == Some(name))
            {
                return true;
            }
        }
    }
    find(tree, "stmt", "ForLoop").into_iter().any(|for_loop| {
        let iterated = &fields(for_loop)["iter"];
        is_content(iterated)
            || (variable(iterated) == Some("content")
                && !in_macros.contains(&std::ptr::from_ref(for_loop)))
    })
}

/// Returns the names of the loop variables that hold a message.
fn message_variables(tree: &Value) -> Vec<&str> {
    // `messages` itself, and what is assigned from it.
    let mut lists = vec!["messages"];
    let mut next = 0;
    while let Some(list) = lists.get(next).copied() {
        next += 1;
        for set in find(tree, "stmt", "Set") {
            let set = fields(set);
            if is_access(&set["expr"], list, None)
                && let Some(name) = variable(&set["target"])
                && !lists.contains(&name)
            {
                lists.push(name);
            }
        }
    }
    find(tree, "stmt", "ForLoop")
        .into_iter()
        .map(fields)
        .filter(|for_loop| {
            lists
                .iter()
                .any(|list| is_access(&for_loop["iter"], list, None))
        })
        .filter_map(|for_loop| variable(&for_loop["target"]))
        .collect()
}

/// Returns the parameters of a macro that get the content of a message at some call.
fn content_parameters<'a>(
    tree: &'a Value,
    macro_node: &'a Value,
    is_content: &dyn Fn(&Value) -> bool,
) -> Vec<&'a str> {
    let macro_fields = fields(macro_node);
    let parameters: Vec<Option<&str>> = macro_fields["args"]
        .as_array()
        .into_iter()
        .flatten()
        .map(variable)
        .collect();
    let mut found = Vec::new();
    for call in find(tree, "expr", "Call") {
        let call = fields(call);
        if variable(&call["expr"]) != macro_fields["name"].as_str() {
            continue;
        }
        for (index, argument) in call["args"].as_array().into_iter().flatten().enumerate() {
            if let Some(value) = argument.get("Pos") {
                found.extend(
                    parameters
                        .get(index)
                        .copied()
                        .flatten()
                        .filter(|_| is_content(value)),
                );
            } else if let Some(Value::Array(pair)) = argument.get("Kwarg")
                && let [Value::String(name), value] = pair.as_slice()
                && is_content(value)
            {
                found.extend(parameters.iter().flatten().find(|known| *known == name));
            }
        }
    }
    found
}

/// Says whether an expression is the variable `name` (or its item `key`), seen through filters, tests and slices.
fn is_access(node: &Value, name: &str, key: Option<&str>) -> bool {
    let inner = fields(node);
    match node["expr"].as_str() {
        Some("Filter" | "Test" | "Slice") => is_access(&inner["expr"], name, key),
        Some("Var") => key.is_none() && variable(node) == Some(name),
        Some("GetItem") => {
            variable(&inner["expr"]) == Some(name)
                && key.is_some_and(|key| fields(&inner["subscript_expr"])["value"] == key)
        }
        Some("GetAttr") => {
            variable(&inner["expr"]) == Some(name) && key.is_some_and(|key| inner["name"] == key)
        }
        _ => false,
    }
}

/// Returns the name, if an expression is a variable.
fn variable(node: &Value) -> Option<&str> {
    if node["expr"] == "Var" {
        fields(node)["id"].as_str()
    } else {
        None
    }
}

/// Returns a node's own fields. The tree wraps them together with their place in the source:
/// `{"stmt": kind, "inner": [fields, span]}`.
fn fields(node: &Value) -> &Value {
    &node["inner"][0]
}

/// Returns all nodes of a kind under (and including) a node.
fn find<'a>(node: &'a Value, class: &str, kind: &str) -> Vec<&'a Value> {
    let mut found = Vec::new();
    let mut stack = vec![node];
    while let Some(node) = stack.pop() {
        if node.get(class).is_some_and(|name| name == kind) {
            found.push(node);
        }
        match node {
            Value::Array(items) => stack.extend(items),
            Value::Object(fields) => stack.extend(fields.values()),
            _ => {}
        }
    }
    found
}
