use super::*;
use crate::openai::chat::types::ChatRequest;
use crate::openai::{request, structured};

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
    plan(Some(&two_tools()), choice, true, parser, Asked::default())
}

#[test]
fn tools_are_offered_unless_the_request_says_otherwise() {
    let calls = |choice| plan_of(choice, Some("json")).unwrap().calls;
    assert_eq!(calls(None), Calls::Parsed);
    assert_eq!(calls(Some(&ToolChoice::None)), Calls::None);
    assert_eq!(
        calls(Some(&ToolChoice::Required)),
        Calls::Listed("parameters")
    );
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

#[derive(serde::Deserialize)]
struct Golden {
    tools: Map<String, Value>,
    rows: Vec<Row>,
}

/// A request, and by the name of a tool parser the constraint that vLLM makes of it.
#[derive(serde::Deserialize)]
struct Row {
    request: Value,
    constraints: Map<String, Value>,
}

fn constraint_of(body: &Value, parser: &str) -> Option<Value> {
    let request: ChatRequest = request::parse(body.to_string().as_bytes()).unwrap();
    let asked = structured::constraint(&request.shared).unwrap();
    let own = &request.own;
    let parallel = own.parallel_tool_calls != Some(false);
    let choice = own.tool_choice.as_ref();
    let plan = plan(
        own.tools.as_deref(),
        choice,
        parallel,
        Some(parser),
        Asked::of(&request.shared),
    )
    .unwrap();
    let json = |text: String| -> Value { serde_json::from_str(&text).unwrap() };
    Some(match plan.hold.apply(asked)?.constraint? {
        Constraint::Json(schema) => json!({"json": json(schema)}),
        Constraint::Regex(regex) => json!({"regex": regex}),
        Constraint::Choice(choice) => json!({"choice": choice.values}),
        Constraint::Grammar(grammar) => json!({"grammar": grammar}),
        Constraint::JsonObject(set) => json!({"json_object": set}),
        Constraint::StructuralTag(tag) => json!({"structural_tag": json(tag)}),
    })
}

/// Made by `scripts/golden_calls.py`.
#[test]
fn the_engine_is_asked_for_what_vllm_asks_it_for() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/constraints.json");
    let golden = std::fs::read(path).unwrap();
    let golden: Golden = serde_json::from_slice(&golden).unwrap();
    for Row {
        request,
        constraints,
    } in golden.rows
    {
        let mut body = request.clone();
        body["tools"] = golden.tools[request["tools"].as_str().unwrap()].clone();
        body["messages"] = json!([]);
        for (parser, expected) in constraints {
            let expected = Some(expected).filter(|expected| !expected.is_null());
            let actual = constraint_of(&body, &parser);
            // As text, because the order of a schema's properties is part of what it asks for.
            let [actual, expected] = [actual, expected].map(|found| json!(found).to_string());
            assert_eq!(actual, expected, "{parser}: {request}");
        }
    }
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
    let tool =
        |kind| json!({"function": {"name": kind, "parameters": {"$defs": {"N": {"type": kind}}}}});
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
        let error = plan(
            Some(&tools(list)),
            Some(&ToolChoice::Required),
            true,
            None,
            Asked::default(),
        )
        .unwrap_err();
        assert_eq!(error.param(), Some(param));
    }
    let error = plan(None, Some(&ToolChoice::Auto), true, None, Asked::default()).unwrap_err();
    assert_eq!(error.param(), Some("tool_choice"));
}
