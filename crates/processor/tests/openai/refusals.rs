//! Requests that are refused before a worker hears of them, each naming the field at fault.

use serde_json::{Value, json};
use stator_processor::config::Config;
use stator_testkit::http::{post, send};

use crate::stage::Stage;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Fields that every generating endpoint has, with values that it refuses, and the field that is named.
fn shared() -> Vec<(Value, &'static str)> {
    let deep = "stop[1]";
    vec![
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_p": [1]}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1.5}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1e300}), "seed"),
        (json!({"seed": 9_223_372_036_854_775_808_u64}), "seed"),
        (json!({"n": 0}), "n"),
        (json!({"n": "two"}), "n"),
        (json!({"n": 1025}), "n"),
        // Small as a body, a gigabyte when every choice has its own.
        (json!({"n": 1024, "guided_regex": "x".repeat(900_000)}), "n"),
        (
            json!({"guided_regex": "x".repeat(1_100_000)}),
            "guided_regex",
        ),
        (
            json!({"structured_outputs": {"choice": vec!["x"; 100_000]}}),
            "structured_outputs",
        ),
        (json!({"stop": "x".repeat(70_000)}), "stop"),
        (json!({"bad_words": vec!["a"; 129]}), "bad_words"),
        (json!({"bad_words": ["x".repeat(5000)]}), "bad_words"),
        (json!({"request_id": "x".repeat(600)}), "request_id"),
        (json!({"request_id": "a\nb"}), "request_id"),
        (json!({"n": 2, "temperature": 0}), "n"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 100_000}), "max_tokens"),
        (json!({"max_tokens": true}), "max_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"min_tokens": 50, "max_tokens": 20}), "min_tokens"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": ["a", 5]}), deep),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop_token_ids": [260]}), "stop_token_ids"),
        (json!({"stop_token_ids": ["a"]}), "stop_token_ids[0]"),
        (json!({"logit_bias": {"260": 1}}), "logit_bias"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": "much"}}), "logit_bias.1"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [-1]}), "allowed_token_ids"),
        (json!({"bad_words": [""]}), "bad_words"),
        (json!({"bad_words": "word"}), "bad_words"),
        (json!({"prompt_logprobs": -3}), "prompt_logprobs"),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs"),
        (
            json!({"stream": true, "prompt_logprobs": 1}),
            "prompt_logprobs",
        ),
        (json!({"stream": "yes"}), "stream"),
        (
            json!({"stream_options": {"include_usage": true}}),
            "stream_options",
        ),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
        ),
        (json!({"ignore_eos": 1}), "ignore_eos"),
        (
            json!({"truncate_prompt_tokens": 513}),
            "truncate_prompt_tokens",
        ),
        (json!({"truncation_side": "middle"}), "truncation_side"),
        (
            json!({"response_format": {"type": "yaml"}}),
            "response_format",
        ),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_json": 5}), "guided_json"),
        (json!({"priority": "high"}), "priority"),
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"cache_salt": "a/b"}), "cache_salt"),
        (json!({"vllm_xargs": [1]}), "vllm_xargs"),
        (
            json!({"thinking_token_budget": -5}),
            "thinking_token_budget",
        ),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (
            json!({"kv_transfer_params": {"do_remote_prefill": true}}),
            "kv_transfer_params",
        ),
        (json!({"logprob_token_ids": [1]}), "logprob_token_ids"),
        (json!({"model": 5}), "model"),
    ]
}

fn with(mut body: Value, fields: &Value) -> String {
    for (name, value) in fields.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body.to_string()
}

fn completion() -> Value {
    json!({"prompt": "hi"})
}

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

#[tokio::test]
async fn a_field_that_makes_no_sense_is_named_with_a_400() {
    let mut stage = Stage::new().await;
    for (fields, param) in shared() {
        for (path, body) in [(COMPLETIONS, completion()), (CHAT, chat())] {
            let (status, error) = stage.refused(path, &with(body, &fields)).await;
            assert_eq!(
                (status, error["param"].as_str()),
                (400, Some(param)),
                "{path} {fields}: {error}"
            );
            assert_eq!(error["type"], "invalid_request_error");
        }
    }
}

#[tokio::test]
async fn a_prompt_that_cannot_be_used_is_named() {
    let mut stage = Stage::new().await;
    for (fields, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": [260]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt[0]"),
        (json!({"prompt": "x".repeat(512)}), "prompt"),
        (json!({"prompt": vec![1; 512]}), "prompt"),
        (json!({"prompt": "x".repeat(600_000)}), "prompt"),
        (json!({"prompt": vec!["a"; 1025]}), "prompt"),
        (json!({"prompt": vec!["a"; 1024], "n": 2}), "n"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"prompt_embeds": "AAAA"}), "prompt_embeds"),
    ] {
        let (status, error) = stage
            .refused(COMPLETIONS, &with(completion(), &fields))
            .await;
        assert_eq!(
            (status, error["param"].as_str()),
            (400, Some(param)),
            "{error}"
        );
    }
}

#[tokio::test]
async fn more_candidates_than_the_vocabulary_has_are_refused_whatever_the_card_allows() {
    let mut stage = Stage::customized(Config::default(), |model| model.max_logprobs = 1000).await;
    let body = with(completion(), &json!({"logprobs": 261}));
    let (status, error) = stage.refused(COMPLETIONS, &body).await;
    assert_eq!(
        (status, error["param"].as_str()),
        (400, Some("logprobs")),
        "{error}"
    );
}

#[tokio::test]
async fn a_rank_that_no_worker_has_is_named() {
    let stage = Stage::new().await;
    for rank in ["one", "", "-1", "1", "99999999999"] {
        let mut request = post(COMPLETIONS, completion().to_string());
        let value = rank.parse().unwrap();
        request.headers_mut().insert("x-data-parallel-rank", value);
        let answered = send(stage.addr, request).await;
        let error = answered.json()["error"].clone();
        assert_eq!(
            (answered.status, error["param"].as_str()),
            (400, Some("x-data-parallel-rank")),
            "{rank}: {error}"
        );
    }
}

#[tokio::test]
async fn a_conversation_that_cannot_be_used_is_named() {
    let mut stage = Stage::new().await;
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let tool = json!({"type": "function", "function": {"name": "f"}});
    for (fields, param) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": ["hello"]}), "messages[0]"),
        (
            json!({"messages": [{"content": "no role"}]}),
            "messages[0].role",
        ),
        (user(json!(5)), "messages[0].content"),
        (
            user(json!([{"text": "no type"}])),
            "messages[0].content[0].type",
        ),
        (
            user(json!([{"type": "image_url", "image_url": {"url": "x"}}])),
            "messages[0].content[0].type",
        ),
        (user(json!("x".repeat(512))), "messages"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (json!({"logprobs": 2}), "logprobs"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"tools": []}), "tools"),
        (json!({"tools": [{}]}), "tools[0]"),
        (
            json!({"tools": [tool], "tool_choice": "auto"}),
            "tool_choice",
        ),
        (json!({"tools": [tool]}), "tool_choice"),
        (
            json!({"tools": [tool], "tool_choice": "maybe"}),
            "tool_choice",
        ),
        (
            json!({"tools": [tool], "tool_choice": {"function": {"name": "g"}}}),
            "tool_choice",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"reasoning_effort": "extreme"}), "reasoning_effort"),
        (json!({"chat_template": "{{ 1 }}"}), "chat_template"),
        (json!({"chat_template_kwargs": [1]}), "chat_template_kwargs"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
    ] {
        let (status, error) = stage.refused(CHAT, &with(chat(), &fields)).await;
        assert_eq!(
            (status, error["param"].as_str()),
            (400, Some(param)),
            "{fields}: {error}"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_no_request_is_refused_without_a_field() {
    let mut stage = Stage::new().await;
    for body in [
        "",
        "{",
        "[]",
        "\"x\"",
        "{\"prompt\": }",
        "{\"prompt\": \"\u{7}\"}",
        "nonsense",
    ] {
        for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
            let (status, error) = stage.refused(path, body).await;
            assert_eq!(status, 400, "{path} {body}");
            assert!(error["param"].is_null(), "{path} {body}: {error}");
        }
    }
}

#[tokio::test]
async fn a_model_that_is_not_served_is_404_and_named() {
    let mut stage = Stage::new().await;
    for (path, body) in [(COMPLETIONS, completion()), (CHAT, chat())] {
        let (status, error) = stage
            .refused(path, &with(body, &json!({"model": "other"})))
            .await;
        assert_eq!((status, error["param"].as_str()), (404, Some("model")));
    }
}

#[tokio::test]
async fn a_body_above_the_limit_is_413() {
    let config = Config {
        max_body_bytes: 1000,
        ..Config::default()
    };
    let mut stage = Stage::customized(config, |_| {}).await;
    let body = with(completion(), &json!({"prompt": "x".repeat(1000)}));
    let (status, _) = stage.refused(COMPLETIONS, &body).await;
    assert_eq!(status, 413);
}

#[tokio::test]
async fn null_means_absent() {
    let mut stage = Stage::new().await;
    let names = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "stream_options",
        "max_tokens",
        "seed",
        "logprobs",
        "response_format",
        "logit_bias",
        "model",
        "user",
        "stop_token_ids",
        "echo",
        "structured_outputs",
    ];
    let mut body = completion();
    for name in names {
        body[name] = Value::Null;
    }
    let answer = stage.ask(COMPLETIONS, &body);
    stage.attempt().await.end();
    assert_eq!(answer.await.unwrap().status, 200);
}
