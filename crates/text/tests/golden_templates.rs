//! Chat templates, compared with what vLLM and transformers rendered.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod support;

use serde_json::{Map, Value};
use stator_text::template::{ChatTemplate, ContentFormat, Conversation, LocalTime};
use support::{json, tokenizer};

#[test]
fn conversations_render_as_vllm_renders_them() {
    let golden = json("templates.json");
    let tokenizer = tokenizer("sentencepiece", 0);
    let tools = golden["tools"].as_array().unwrap();
    let mut wrong = Vec::new();
    for row in golden["rows"].as_array().unwrap() {
        let field = |name: &str| row[name].as_str().unwrap();
        let source = golden["templates"][field("template")].as_str().unwrap();
        let template = ChatTemplate::compile(source, tokenizer.special()).unwrap();
        let format = match field("format") {
            "openai" => ContentFormat::Parts,
            _ => ContentFormat::String,
        };
        assert_eq!(template.content_format(), format, "{}", field("template"));

        let mut kwargs: Map<String, Value> = row["options"].as_object().unwrap().clone();
        let mut flag = |name: &str| kwargs.remove(name).is_some_and(|value| value == true);
        let add_generation_prompt = flag("add_generation_prompt");
        let continue_final_message = flag("continue_final_message");
        let documents = kwargs.remove("documents");
        let rendered = template.render(&Conversation {
            messages: golden["conversations"][field("conversation")]
                .as_array()
                .unwrap(),
            tools: (row["tools"] == true).then_some(tools),
            documents: documents
                .as_ref()
                .and_then(Value::as_array)
                .map(Vec::as_slice),
            add_generation_prompt,
            continue_final_message,
            kwargs: Some(&kwargs),
            content_format: None,
            now: LocalTime {
                unix_seconds: golden["now"].as_i64().unwrap(),
                utc_offset_seconds: 0,
            },
        });
        let what = format!(
            "{} {} {}",
            field("template"),
            field("conversation"),
            row["options"]
        );
        match (rendered, row["text"].as_str()) {
            (Ok(text), Some(wanted)) if text == wanted => {}
            (Err(_), None) => {}
            (Ok(text), wanted) => wrong.push(format!("{what}\n got {text:?}\nwant {wanted:?}")),
            (Err(error), wanted) => wrong.push(format!("{what}\n got {error}\nwant {wanted:?}")),
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(4)].join("\n")
    );
}
