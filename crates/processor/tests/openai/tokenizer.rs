//! What the tokenizer says, and templates that requests bring.

use serde_json::json;
use stator_processor::config::Config;
use stator_testkit::http::{post, send};

use crate::stage::Stage;

#[tokio::test]
async fn text_and_conversations_become_tokens_and_tokens_text() {
    let stage = Stage::new().await;
    let ask = |path: &'static str, body: serde_json::Value| {
        send(stage.addr, post(path, body.to_string()))
    };
    let body = json!({"model": "model", "prompt": "hé", "return_token_strs": true});
    let tokenized = ask("/tokenize", body).await.json();
    assert_eq!(
        tokenized,
        json!({"count": 3, "max_model_len": 512, "tokens": [104, 195, 169],
        "token_strs": ["h", "Ã", "©"]})
    );
    let body =
        json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false});
    let tokenized = ask("/tokenize", body).await.json();
    assert_eq!(tokenized["count"], "<user>x".len());
    let detokenized = ask("/detokenize", json!({"tokens": [104, 195, 169, 256]}))
        .await
        .json();
    assert_eq!(detokenized, json!({"prompt": "hé<|end|>"}));
}

#[tokio::test]
async fn what_cannot_be_tokenized_is_named() {
    let mut stage = Stage::new().await;
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 5}), "prompt"),
        (
            "/tokenize",
            json!({"prompt": "a", "messages": []}),
            "prompt",
        ),
        ("/tokenize", json!({"messages": []}), "messages"),
        ("/detokenize", json!({"tokens": "a"}), "tokens"),
        ("/detokenize", json!({"tokens": [1, -1]}), "tokens[1]"),
        ("/detokenize", json!({"tokens": [1, 9999]}), "tokens"),
    ] {
        let (status, error) = stage.refused(path, &body.to_string()).await;
        assert_eq!(
            (status, error["param"].as_str()),
            (400, Some(param)),
            "{body}: {error}"
        );
    }
}

#[tokio::test]
async fn a_trusted_client_may_bring_its_template() {
    let config = Config {
        trust_request_chat_template: true,
        ..Config::default()
    };
    let mut stage = Stage::customized(config, |_| {}).await;
    let body = json!({"messages": [{"role": "user", "content": "x"}],
        "chat_template": "{{ messages[0].content }}={{ value }}", "chat_template_kwargs": {"value": 7}});
    let answer = stage.ask("/v1/chat/completions", &body);
    let attempt = stage.attempt().await;
    assert_eq!(attempt.prompt(), "x=7");
    attempt.end();
    assert_eq!(answer.await.unwrap().status, 200);
}
