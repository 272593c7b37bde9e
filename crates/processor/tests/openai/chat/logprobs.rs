//! Log-probabilities, of the answer and of the prompt.

use super::*;

#[tokio::test]
async fn logprobs_show_the_chosen_token_and_the_most_likely_ones() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"logprobs": true, "top_logprobs": 2})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().logprobs, Some(2));
    attempt.send(Delta {
        tokens: tokens("ab"),
        logprobs: vec![
            // The chosen token is the most likely one; then one that is not among the two.
            position(&[('a', -0.5), ('a', -0.5), ('x', f32::NEG_INFINITY)], 1),
            position(&[('b', -3.0), ('y', -0.25), ('z', -1.0)], 9),
        ],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({"content": [
            {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "x", "logprob": -9999.0, "bytes": [120]},
            ]},
            {"token": "b", "logprob": -3.0, "bytes": [98], "top_logprobs": [
                {"token": "b", "logprob": -3.0, "bytes": [98]},
                {"token": "y", "logprob": -0.25, "bytes": [121]},
            ]},
        ]})
    );
}

#[tokio::test]
async fn tokens_may_be_shown_by_id() {
    let mut stage = Stage::new().await;
    let fields = json!({"logprobs": true, "top_logprobs": 1, "return_tokens_as_token_ids": true,
        "return_token_ids": true});
    let answer = stage.ask(CHAT, &hi(&fields));
    let attempt = stage.attempt().await;
    attempt.send(Delta {
        tokens: tokens("a"),
        logprobs: vec![position(&[('a', -0.5), ('a', -0.5)], 1)],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    let entry = &body["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["token"], "token_id:97");
    assert_eq!(entry["bytes"], json!([97]));
    assert_eq!(body["choices"][0]["token_ids"], json!([97]));
    assert_eq!(body["prompt_token_ids"].as_array().unwrap().len(), 19);
}

#[tokio::test]
async fn prompt_logprobs_come_beside_the_choices() {
    let mut stage = Stage::new().await;
    let answer = stage.ask(CHAT, &hi(&json!({"prompt_logprobs": 1})));
    let attempt = stage.attempt().await;
    assert_eq!(attempt.sampling().prompt_logprobs, Some(1));
    assert_eq!(attempt.sampling().skip_reading_prefix_cache, Some(true));
    attempt.send(Delta {
        tokens: tokens("a"),
        prompt_logprobs: vec![position(&[('u', -2.0), ('s', -0.5)], 4)],
        finish: FinishReason::Length.into(),
        ..Delta::default()
    });
    let body = answer.await.unwrap().json();
    assert_eq!(
        body["prompt_logprobs"],
        json!([null, {
            "117": {"logprob": -2.0, "rank": 4, "decoded_token": "u"},
            "115": {"logprob": -0.5, "rank": 1, "decoded_token": "s"},
        }])
    );
}
