//! What a request is answered with, and when it ends.

use super::*;

#[tokio::test]
async fn an_answer_is_a_function_of_the_prompt() {
    let (mut frontend, _engine) = start("").await;
    frontend.add("a", &[10, 11, 12], 20, &[]).await;
    let answer = frontend.finish("a").await;
    assert_eq!(answer.tokens, expected(&[10, 11, 12], 20));
    assert_eq!((answer.finish, answer.stop_reason), (Some(1), None));
    assert_eq!(answer.outputs.len(), 20);
}

#[tokio::test]
async fn many_requests_share_steps_and_do_not_disturb_each_other() {
    let (mut frontend, _engine) = start("").await;
    for i in 0..10u32 {
        frontend.add(&format!("r{i}"), &[10 + i, 5], 30, &[]).await;
    }
    let mut answers = vec![support::Answer::default(); 10];
    let mut shared = 0;
    while answers.iter().any(|answer| answer.finish.is_none()) {
        let message = frontend.next().await;
        let before: usize = answers.iter().map(|a| a.outputs.len()).sum();
        for (i, answer) in answers.iter_mut().enumerate() {
            answer.take(&format!("r{i}"), &message);
        }
        let after: usize = answers.iter().map(|a| a.outputs.len()).sum();
        assert!(after - before <= 4, "--max-num-seqs is 4");
        shared += usize::from(after - before > 1);
    }
    assert!(shared > 0);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer.tokens, expected(&[10 + i as u32, 5], 30));
    }
}

#[tokio::test]
async fn stop_tokens_and_eos_end_an_answer() {
    let (mut frontend, _engine) = start("").await;
    let tokens = expected(&[10], 20);
    let stop = ("stop_token_ids", Value::from(vec![tokens[5]]));
    frontend
        .add("stop", &[10], 20, std::slice::from_ref(&stop))
        .await;
    let answer = frontend.finish("stop").await;
    let first = tokens.iter().position(|token| *token == tokens[5]).unwrap();
    assert_eq!(answer.tokens, tokens[..=first]);
    assert_eq!(answer.finish, Some(0));
    assert_eq!(answer.stop_reason, Some(u64::from(tokens[5])));

    frontend
        .add("eos", &[10], 20, &[("_eos_token_id", tokens[5].into())])
        .await;
    let answer = frontend.finish("eos").await;
    assert_eq!((answer.finish, answer.stop_reason), (Some(0), None));

    frontend
        .add("min", &[10], 20, &[stop, ("min_tokens", Value::Int(20))])
        .await;
    let answer = frontend.finish("min").await;
    assert_eq!((answer.tokens.len(), answer.finish), (20, Some(1)));
}

#[tokio::test]
async fn an_abort_is_silent_and_frees_the_engine() {
    let (mut frontend, _engine) = start_with("", |mut config| {
        config.timing.speedup = 1.0;
        config
    })
    .await;
    frontend.add("long", &[10], 400, &[]).await;
    frontend.next().await;
    frontend.abort(&["long", "unknown"]).await;
    // A call is answered after whatever the aborted request still had to say.
    frontend.call("is_sleeping", vec![]).await.unwrap();
    assert!(frontend.call("reset_prefix_cache", vec![]).await.unwrap() == Value::Bool(true));
    frontend.add("next", &[10], 2, &[]).await;
    let mut gone = support::Answer::default();
    let mut next = support::Answer::default();
    while next.finish.is_none() {
        let message = frontend.next().await;
        gone.take("long", &message);
        next.take("next", &message);
    }
    assert_eq!(gone.finish, None);
}

#[tokio::test]
async fn log_probabilities_come_in_line_or_in_frames_by_their_size() {
    let (mut frontend, _engine) = start("").await;
    frontend
        .add("few", &[10], 1, &[("logprobs", Value::Int(2))])
        .await;
    let few = frontend.finish("few").await;
    assert_eq!(few.outputs[0].1, 0);
    frontend
        .add("all", &[10], 1, &[("logprobs", Value::Int(-1))])
        .await;
    let all = frontend.finish("all").await;
    assert_eq!(all.outputs[0].1, 2);
    let logprobs = all.outputs[0].0[2].as_array().unwrap();
    assert_eq!(
        logprobs[0],
        Value::Array(vec!["<i4".into(), vec![1u32, 65].into(), Value::Int(1)])
    );
    let prompt: Vec<u32> = (4..64).collect();
    frontend
        .add("prompt", &prompt, 1, &[("prompt_logprobs", Value::Int(1))])
        .await;
    let answer = frontend.finish("prompt").await;
    let logprobs = answer.outputs[0].0[3].as_array().unwrap();
    assert_eq!(logprobs.len(), 5);
    assert_eq!(
        logprobs[1],
        Value::Array(vec!["float32".into(), vec![59u32, 2].into(), Value::Int(2)])
    );
    // Reading prompt log-probabilities does not read the cache.
    assert_eq!(answer.prefill("num_cached_tokens"), Some(0));
}

#[tokio::test]
async fn other_versions_have_other_layouts_and_the_same_answers() {
    for (wire, fields) in [
        (WireVersion::V0_27, 14),
        (WireVersion::V0_32, 18),
        (WireVersion::V0_33, 19),
    ] {
        for extra in [0, 3] {
            let (mut frontend, _engine) = start_with("", |config| Config {
                extra_fields: extra,
                ..with_wire(config, wire)
            })
            .await;
            let version = frontend.ready.get("vllm_version").unwrap();
            assert_eq!(version.as_str(), Some(wire.vllm_version()));
            frontend.add("a", &[10], 3, &[]).await;
            let answer = frontend.finish("a").await;
            assert_eq!(answer.outputs[0].0.len(), fields + extra);
            assert_eq!(answer.tokens, expected(&[10], 3));
        }
    }
}
