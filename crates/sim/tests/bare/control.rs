//! Utility calls, pauses, and a frontend that comes back.

use super::*;

#[tokio::test]
async fn utilities_answer_and_unknown_ones_fail_by_name() {
    let (mut frontend, _engine) = start("--enable-lora --max-loras 2").await;
    let lora = |name: &str, id: i64| {
        Value::Array(vec![name.into(), Value::Int(id), "/x".into(), Value::Nil])
    };
    for (method, args, result) in [
        ("is_scheduler_paused", vec![], Value::Bool(false)),
        (
            "get_supported_tasks",
            vec![],
            vec!["generate".to_owned()].into(),
        ),
        ("add_lora", vec![lora("one", 1)], Value::Bool(true)),
        ("list_loras", vec![], vec![1u32].into()),
        ("remove_lora", vec![Value::Int(1)], Value::Bool(true)),
        (
            "pause_scheduler",
            vec!["keep".into(), false.into()],
            Value::Nil,
        ),
        ("is_scheduler_paused", vec![], Value::Bool(true)),
        ("resume_scheduler", vec![], Value::Nil),
        ("sleep", vec![Value::Int(1)], Value::Nil),
        ("is_sleeping", vec![], Value::Bool(true)),
        ("wake_up", vec![], Value::Bool(true)),
        ("is_sleeping", vec![], Value::Bool(false)),
    ] {
        assert_eq!(frontend.call(method, args).await, Ok(result), "{method}");
    }
    assert_eq!(
        frontend.call("no_such_method", vec![]).await,
        Err(
            "Call to no_such_method method failed: 'EngineCoreProc' object has no attribute \
             'no_such_method'"
                .into()
        )
    );
}

#[tokio::test]
async fn a_paused_engine_keeps_what_waits_and_resumes_it() {
    let (mut frontend, _engine) = start("").await;
    frontend
        .call("pause_scheduler", vec!["wait".into()])
        .await
        .unwrap();
    frontend.add("a", &[10], 3, &[]).await;
    assert_eq!(
        frontend.call("is_scheduler_paused", vec![]).await,
        Ok(Value::Bool(true))
    );
    frontend.post("resume_scheduler", vec![]).await;
    assert_eq!(frontend.finish("a").await.tokens, expected(&[10], 3));
}

#[tokio::test]
async fn a_paused_generation_turns_requests_away_since_0_33() {
    let (mut frontend, _engine) = start("").await;
    frontend.call("pause_generation", vec![]).await.unwrap();
    frontend.add("a", &[10], 3, &[]).await;
    let answer = frontend.finish("a").await;
    assert_eq!(answer.finish, Some(3));
    let error = &answer.outputs[0].0[18];
    assert_eq!(error.get("code"), Some(&"engine_paused".into()));
    assert_eq!(error.get("retryable"), Some(&Value::Bool(true)));
    frontend.call("resume_scheduler", vec![]).await.unwrap();
    frontend.add("b", &[10], 3, &[]).await;
    assert_eq!(frontend.finish("b").await.tokens, expected(&[10], 3));

    let (mut frontend, _engine) =
        start_with("", |config| with_wire(config, WireVersion::V0_32)).await;
    assert!(frontend.call("pause_generation", vec![]).await.is_err());
}

#[tokio::test]
async fn a_frontend_that_comes_back_finds_its_engine_and_what_it_said_meanwhile() {
    let (mut frontend, _engine) = start_with("", |mut config| {
        config.timing.speedup = 1.0;
        config
    })
    .await;
    frontend.add("a", &[10], 100, &[]).await;
    let mut before = support::Answer::default();
    while before.tokens.len() < 5 {
        let message = frontend.next().await;
        before.take("a", &message);
    }
    let mut frontend = frontend.restart().await;
    let after = frontend.finish("a").await;
    // Nothing is acknowledged on this wire: what was on the way when the frontend went is lost.
    let all = expected(&[10], 100);
    assert!(all.ends_with(&after.tokens));
    assert!(after.tokens.len() + before.tokens.len() > 50);
    assert_eq!(after.finish, Some(1));
    assert!(frontend.call("is_scheduler_paused", vec![]).await.is_ok());
}

#[tokio::test]
async fn a_stopped_engine_aborts_what_runs() {
    let (mut frontend, engine) = start_with("", |mut config| {
        config.timing.speedup = 1.0;
        config
    })
    .await;
    frontend.add("a", &[10], 400, &[]).await;
    frontend.next().await;
    engine.stop();
    assert_eq!(frontend.finish("a").await.finish, Some(2));
    assert_eq!(engine.await.unwrap(), Exit::Stopped);
}

#[tokio::test]
async fn an_engine_whose_blocks_cannot_hold_one_request_does_not_start() {
    let config = config(1, "--num-gpu-blocks-override 64");
    assert!(Sim::spawn(config).await.is_err());
}
