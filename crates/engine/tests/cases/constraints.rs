//! Constraints on the output, for each backend.

use super::*;

fn constrained(name: &str, backend: Backend, constraint: Constraint, expected: &Value) -> Case {
    let mut request = request();
    request.sampling.structured_outputs = Some(StructuredOutputs {
        constraint,
        disable_any_whitespace: false,
        disable_additional_properties: false,
        whitespace_pattern: None,
    });
    let limits = Limits {
        structured_outputs: Some(backend),
        ..limits()
    };
    let sampling = json!({"structured_outputs": expected});
    add_within(name, request, limits, &json!({}), &sampling)
}

pub(super) fn all() -> Vec<Case> {
    let schema = r#"{"type": "object", "properties": {"a": {"type": "integer"}}}"#;
    let choices = || Constraint::Choice(vec!["a\"b".into(), "c\n\u{7f}é".into()]);
    let tag = r#"{"structures": [], "triggers": []}"#;
    let xgrammar = Backend::Xgrammar;
    vec![
        constrained(
            "a JSON schema",
            xgrammar,
            Constraint::Json(schema.into()),
            &json!({"json": schema, "_backend": "xgrammar"}),
        ),
        constrained(
            "any JSON object",
            Backend::Guidance,
            Constraint::JsonObject,
            &json!({"json_object": true, "_backend": "guidance"}),
        ),
        constrained(
            "a regular expression",
            Backend::Outlines,
            Constraint::Regex("[ab]+".into()),
            &json!({"regex": "[ab]+", "_backend": "outlines"}),
        ),
        constrained(
            "a choice for xgrammar",
            xgrammar,
            choices(),
            &json!({
                "grammar": "root ::= \"a\\\"b\" | \"c\\n\\u007fé\"", "_backend": "xgrammar",
            }),
        ),
        constrained(
            "a choice for guidance",
            Backend::Guidance,
            choices(),
            &json!({"choice": ["a\"b", "c\n\u{7f}é"], "_backend": "guidance"}),
        ),
        constrained(
            "a grammar",
            xgrammar,
            Constraint::Grammar("root ::= \"a\"".into()),
            &json!({"grammar": "root ::= \"a\"", "_backend": "xgrammar"}),
        ),
        constrained(
            "a structural tag",
            xgrammar,
            Constraint::StructuralTag(tag.into()),
            &json!({"structural_tag": tag, "_backend": "xgrammar"}),
        ),
    ]
}
