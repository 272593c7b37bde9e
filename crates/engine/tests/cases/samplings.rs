//! Sampling parameters, one by one.

use super::*;

fn sampled(name: &str, sampling: Sampling, expected: &Value) -> Case {
    let request = Request {
        sampling: Sampling {
            max_tokens: sampling.max_tokens.max(5),
            ..sampling
        },
        ..request()
    };
    add(name, request, &json!({}), expected)
}

pub(super) fn all() -> Vec<Case> {
    let default = Sampling::default;
    vec![
        sampled(
            "every number",
            Sampling {
                temperature: Some(0.7),
                top_p: Some(0.9),
                top_k: Some(40),
                min_p: Some(0.05),
                seed: Some(i64::MIN),
                presence_penalty: Some(-2.0),
                frequency_penalty: Some(1.1),
                repetition_penalty: Some(1.3),
                max_tokens: 64,
                min_tokens: 3,
                logprobs: Some(20),
                thinking_token_budget: Some(9),
                ..default()
            },
            // 0.7 as it was given, which a float of 32 bits could not say.
            &json!({
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.05,
                "seed": i64::MIN,
                "presence_penalty": -2.0,
                "frequency_penalty": 1.1,
                "repetition_penalty": 1.3,
                "max_tokens": 64,
                "min_tokens": 3,
                "logprobs": 20,
                "thinking_token_budget": 9,
            }),
        ),
        sampled(
            "greedy forgets what picks among candidates",
            Sampling {
                temperature: Some(0.0),
                top_p: Some(0.5),
                top_k: Some(5),
                min_p: Some(0.5),
                ..default()
            },
            &json!({"temperature": 0.0}),
        ),
        sampled(
            "a tiny temperature is raised",
            Sampling {
                temperature: Some(1e-7),
                top_k: Some(-1),
                seed: Some(-1),
                ..default()
            },
            &json!({"temperature": 0.01}),
        ),
        sampled(
            "as many tokens as there is room for",
            Sampling {
                max_tokens: u32::MAX,
                ..default()
            },
            &json!({"max_tokens": 4090}),
        ),
        sampled(
            "ends of sequence",
            Sampling {
                stop_token_ids: vec![11, 10, 11],
                eos_token_id: Some(2),
                all_stop_token_ids: vec![2, 3],
                ..default()
            },
            &json!({
                "stop_token_ids": [3, 10, 11],
                "_eos_token_id": 2,
                "_all_stop_token_ids": [2, 3, 10, 11],
            }),
        ),
        sampled(
            "ignored ends of sequence still are what min_tokens masks",
            Sampling {
                stop_token_ids: vec![10],
                ignore_eos: true,
                eos_token_id: Some(2),
                all_stop_token_ids: vec![3, 999_999],
                ..default()
            },
            &json!({
                "stop_token_ids": [10],
                "ignore_eos": true,
                "_all_stop_token_ids": [2, 3, 10],
            }),
        ),
        sampled(
            "token lists",
            Sampling {
                logit_bias: vec![(5, 1.5), (6, -1000.0)],
                allowed_token_ids: vec![1, 2],
                bad_words: vec![vec![7], vec![8, 9]],
                ..default()
            },
            &json!({
                "logit_bias": {"5": 1.5, "6": -100.0},
                "allowed_token_ids": [1, 2],
                "_bad_words_token_ids": [[7], [8, 9]],
            }),
        ),
        sampled(
            "prompt log-probabilities do without the prefix cache",
            Sampling {
                prompt_logprobs: Some(0),
                logprobs: Some(0),
                ..default()
            },
            &json!({"prompt_logprobs": 0, "logprobs": 0, "skip_reading_prefix_cache": true}),
        ),
    ]
}
