//! Completions that succeed.

use serde_json::{Value, json};
use stator_common::proto::worker::{Delta, FinishReason};
use stator_testkit::model::tokens;

use crate::stage::{Stage, position};

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_text_is_continued() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(COMPLETIONS, &json!({"model": "org/alias", "prompt": "one"}));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.prompt(), "one");
    assert_eq!(attempt.sampling().max_tokens, 16);
    attempt.finish(&tokens(" two"), FinishReason::Length);
    let body = answer.await.unwrap().json();
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "model");
    assert_eq!(body["choices"][0]["text"], " two");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["total_tokens"], 7);
}

#[tokio::test]
async fn several_prompts_have_n_choices_each() {
    for prompt in [json!(["a", "bc"]), json!([[97], [98, 99]])] {
        let mut stage = Stage::new().await;
        let answer = stage.ask(COMPLETIONS, &json!({"prompt": prompt, "n": 2}));
        let mut attempts = Vec::new();
        for _ in 0..4 {
            attempts.push(stage.attempt().await);
        }
        let prompts: Vec<_> = attempts.iter().map(|attempt| attempt.prompt()).collect();
        assert_eq!(prompts, ["a", "a", "bc", "bc"]);
        for (i, attempt) in attempts.iter().enumerate() {
            attempt.finish(&tokens(&i.to_string()), FinishReason::Length);
        }
        let body = answer.await.unwrap().json();
        for i in 0..4 {
            assert_eq!(body["choices"][i]["index"], i);
            assert_eq!(body["choices"][i]["text"], i.to_string());
        }
        assert_eq!(body["usage"]["prompt_tokens"], 3);
        assert_eq!(body["usage"]["completion_tokens"], 4);
    }
}

#[tokio::test]
async fn tokens_are_taken_as_they_are_and_returned_if_asked_for() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let body = json!({"prompt": [97, 98], "return_token_ids": true, "stream": stream});
        let answer = stage.ask(COMPLETIONS, &body);
        let attempt = stage.attempt().await;
        attempt.finish(&tokens("c"), FinishReason::Length);
        let answered = answer.await.unwrap();
        let body = if stream {
            answered.events()[0].clone()
        } else {
            answered.json()
        };
        assert_eq!(body["choices"][0]["prompt_token_ids"], json!([97, 98]));
        assert_eq!(body["choices"][0]["token_ids"], json!([99]));
    }
}

#[tokio::test]
async fn the_prompt_can_be_shown_before_the_answer_or_alone() {
    for (max_tokens, text) in [(2, "ab!?"), (0, "ab")] {
        for (stream, prompt) in [
            (false, json!("ab")),
            (true, json!("ab")),
            (false, json!([97, 98])),
        ] {
            let mut stage = Stage::new().await;
            let body =
                json!({"prompt": prompt, "echo": true, "max_tokens": max_tokens, "stream": stream});
            let answer = stage.ask(COMPLETIONS, &body);
            let attempt = stage.attempt().await;
            assert_eq!(attempt.sampling().max_tokens, max_tokens.max(1));
            let generated = if max_tokens == 0 { "!" } else { "!?" };
            attempt.finish(&tokens(generated), FinishReason::Length);
            let answered = answer.await.unwrap();
            let shown: String = if stream {
                let events = answered.events();
                events
                    .iter()
                    .filter_map(|event| event["choices"][0]["text"].as_str())
                    .collect()
            } else {
                answered.json()["choices"][0]["text"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            };
            assert_eq!(shown, text, "stream {stream}");
        }
    }
}

#[tokio::test]
async fn logprobs_are_four_lists() {
    for stream in [false, true] {
        let mut stage = Stage::new().await;
        let body = json!({"prompt": "ab", "logprobs": 1, "echo": true, "stream": stream});
        let answer = stage.ask(COMPLETIONS, &body);
        let attempt = stage.attempt().await;
        assert_eq!(attempt.sampling().logprobs, Some(1));
        assert_eq!(attempt.sampling().prompt_logprobs, Some(1));
        attempt.send(Delta {
            tokens: tokens("c"),
            prompt_logprobs: vec![position(&[('b', -2.0), ('x', -1.0)], 3)],
            logprobs: vec![position(&[('c', -0.5), ('c', -0.5)], 1)],
            finish: FinishReason::Length.into(),
            ..Delta::default()
        });
        let answered = answer.await.unwrap();
        let body = if stream {
            answered.events()[0].clone()
        } else {
            answered.json()
        };
        assert_eq!(
            body["choices"][0]["logprobs"],
            json!({
                "text_offset": [0, 1, 2],
                "token_logprobs": [null, -2.0, -0.5],
                "tokens": ["a", "b", "c"],
                "top_logprobs": [null, {"b": -2.0, "x": -1.0}, {"c": -0.5}],
            }),
            "stream {stream}"
        );
    }
}

#[tokio::test]
async fn offsets_go_on_from_event_to_event() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(
        COMPLETIONS,
        &json!({"prompt": "x", "logprobs": 0, "stream": true}),
    );
    let attempt = stage.attempt().await;
    for token in ["a", "b"] {
        let c = token.chars().next().unwrap();
        let logprobs = vec![position(&[(c, -0.5)], 1)];
        attempt.send(Delta {
            tokens: tokens(token),
            logprobs,
            ..Delta::default()
        });
        tokio::task::yield_now().await;
    }
    attempt.finish(&[], FinishReason::Length);
    let events = answer.await.unwrap().events();
    let offsets = events.iter().flat_map(|event| {
        event["choices"][0]["logprobs"]["text_offset"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    });
    assert_eq!(offsets.collect::<Vec<Value>>(), [json!(0), json!(1)]);
}

#[tokio::test]
async fn a_stream_counts_the_tokens_of_all_prompts_at_its_end() {
    let mut stage = Stage::new().await;
    let body =
        json!({"prompt": ["a", "bc"], "stream": true, "stream_options": {"include_usage": true}});
    let answer = stage.ask(COMPLETIONS, &body);
    for _ in 0..2 {
        stage
            .attempt()
            .await
            .finish(&tokens("xy"), FinishReason::Length);
    }
    let events = answer.await.unwrap().events();
    let usage = &events[events.len() - 1]["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(3), &json!(4))
    );
}

#[tokio::test]
async fn every_sampling_field_reaches_the_engine() {
    let mut stage = Stage::new().await;
    let body = json!({
        "prompt": "x", "temperature": 0.001, "top_p": 0.5, "top_k": -1, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1.5, "repetition_penalty": 1.25,
        "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [7.0, 7],
        "logit_bias": {"65": 200, "66": -1.5}, "allowed_token_ids": [65, 66], "bad_words": ["no"],
        "priority": 3, "cache_salt": "tenant", "vllm_xargs": {"a": [1, "b"]},
        "thinking_token_budget": 5, "user": "u", "metadata": {"k": "v"}, "store": true,
        "service_tier": "auto", "no_such_field": [1],
    });
    let answer = stage.ask(COMPLETIONS, &body);
    let attempt = stage.attempt().await;
    let sampling = attempt.sampling();
    assert_eq!(sampling.temperature, Some(0.01));
    assert_eq!(
        (sampling.top_p, sampling.top_k, sampling.min_p),
        (Some(0.5), Some(0), Some(0.1))
    );
    assert_eq!(sampling.presence_penalty, Some(1.0));
    assert_eq!(sampling.frequency_penalty, Some(-1.5));
    assert_eq!(sampling.repetition_penalty, Some(1.25));
    assert_eq!((sampling.min_tokens, sampling.ignore_eos), (2, true));
    assert_eq!(
        (sampling.eos_token_id, &sampling.stop_token_ids[..]),
        (None, &[7][..])
    );
    assert_eq!(sampling.all_stop_token_ids, [7, 257, 256]);
    assert_eq!(
        (sampling.logit_bias[&65], sampling.logit_bias[&66]),
        (100.0, -1.5)
    );
    assert_eq!(sampling.allowed_token_ids, [65, 66]);
    let words: Vec<_> = sampling
        .bad_words
        .iter()
        .map(|list| list.tokens.clone())
        .collect();
    assert_eq!(words, [tokens("no")]);
    assert_eq!(sampling.extra_args_json, r#"{"a":[1,"b"]}"#);
    assert_eq!(sampling.thinking_token_budget, Some(5));
    assert_eq!(
        (
            attempt.request.priority,
            attempt.request.cache_salt.as_str()
        ),
        (3, "tenant")
    );
    attempt.end();
    assert_eq!(answer.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_clients_own_id_names_the_answer() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(COMPLETIONS, &json!({"prompt": "x", "request_id": "mine"}));
    stage.attempt().await.end();
    assert_eq!(answer.await.unwrap().json()["id"], "cmpl-mine");
}
