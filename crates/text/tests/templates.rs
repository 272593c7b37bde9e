//! What chat templates may do, and what they may not.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod support;

use serde_json::{Value, json};
use stator_text::template::{ChatTemplate, ChatTemplates, Conversation, LocalTime, TemplateError};
use stator_text::{ModelFiles, SpecialTokens};

fn conversation(messages: &[Value]) -> Conversation<'_> {
    Conversation {
        messages,
        tools: None,
        documents: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs: None,
        content_format: None,
        now: LocalTime::default(),
    }
}

fn render(source: &str) -> Result<String, TemplateError> {
    let messages = [json!({"role": "user", "content": "hi"})];
    ChatTemplate::compile(source, &SpecialTokens::default())?.render(&conversation(&messages))
}

#[test]
fn a_template_cannot_run_forever() {
    let source =
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ a * b }}{% endfor %}{% endfor %}";
    assert!(matches!(render(source), Err(TemplateError::Limit { .. })));
}

#[test]
fn a_template_cannot_recurse_forever() {
    let source = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(matches!(render(source), Err(TemplateError::Failed { .. })));
}

#[test]
fn a_template_cannot_write_without_end() {
    let source = "{% set big = 'x' * 1000000 %}{% for a in range(1000) %}{{ big }}{% endfor %}";
    assert!(matches!(render(source), Err(TemplateError::Limit { .. })));
}

#[test]
fn a_template_cannot_reach_files() {
    assert!(render("{% include '/etc/passwd' %}").is_err());
}

#[test]
fn a_template_may_refuse_in_its_own_words() {
    let error = render("{{ raise_exception('no ' ~ messages[0].content) }}").unwrap_err();
    assert!(
        matches!(&error, TemplateError::Raised { message } if message == "no hi"),
        "{error}"
    );
    assert_eq!(error.code().http_status(), 400);
}

#[test]
fn a_broken_template_says_where() {
    let error = render("one\n{% if %}").unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn what_is_wrong_with_a_message_names_the_field() {
    let cases = [
        (json!("x"), "messages[0]"),
        (json!({"content": "x"}), "messages[0].role"),
        (json!({"role": "user", "content": 7}), "messages[0].content"),
        (
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"role": "user", "content": [{"type": "text", "text": 1}]}),
            "messages[0].content[0].text",
        ),
        (
            json!({"role": "assistant", "tool_calls": [7]}),
            "messages[0].tool_calls[0]",
        ),
    ];
    let template = ChatTemplate::compile("{{ messages }}", &SpecialTokens::default()).unwrap();
    for (message, wanted) in cases {
        let error = template.render(&conversation(&[message])).unwrap_err();
        assert!(
            matches!(&error, TemplateError::Invalid { field, .. } if field == wanted),
            "{error}"
        );
    }
    assert!(template.render(&conversation(&[])).is_err());
}

#[test]
fn kwargs_are_variables_but_cannot_replace_the_conversation() {
    let template = ChatTemplate::compile(
        "{{ mood }} {{ messages|length }}",
        &SpecialTokens::default(),
    )
    .unwrap();
    let messages = [json!({"role": "user", "content": "hi"})];
    let kwargs = json!({"mood": "calm"});
    let with = |kwargs: &Value| {
        template.render(&Conversation {
            kwargs: kwargs.as_object(),
            ..conversation(&messages)
        })
    };
    assert_eq!(with(&kwargs).unwrap(), "calm 1");
    assert!(with(&json!({"messages": []})).is_err());
    assert!(with(&json!({"chat_template": "x"})).is_err());
}

#[test]
fn the_template_file_wins_and_tools_have_their_own_template() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]});
    let config = serde_json::to_vec(&config).unwrap();
    let mut files = ModelFiles {
        tokenizer_config: Some(&config),
        ..ModelFiles::default()
    };
    let messages = [json!({"role": "user", "content": "hi"})];
    let special = SpecialTokens::default();

    let named = ChatTemplates::from_files(&files, &special).unwrap();
    let text = |tools| {
        named
            .select(tools)
            .unwrap()
            .render(&conversation(&messages))
            .unwrap()
    };
    assert_eq!(
        (text(false), text(true)),
        ("plain".to_owned(), "tools".to_owned())
    );
    assert!(named.named("tool_use").is_some());

    files.chat_template = Some(b"file");
    let file = ChatTemplates::from_files(&files, &special).unwrap();
    assert_eq!(
        file.select(true)
            .unwrap()
            .render(&conversation(&messages))
            .unwrap(),
        "file"
    );

    let none = ChatTemplates::from_files(&ModelFiles::default(), &special).unwrap();
    assert!(matches!(none.select(false), Err(TemplateError::Missing)));
}
