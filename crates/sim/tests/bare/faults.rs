//! What kills, deafens or fails an engine: a frontend's doing, or told by flags.

use super::*;

#[tokio::test]
async fn what_kills_a_real_engine_kills_this_one() {
    let long = vec![10; 513];
    for (name, prompt) in [
        ("a token out of the vocabulary", vec![10, 64]),
        ("an empty prompt", vec![]),
        ("a prompt beyond the model", long),
    ] {
        let (mut frontend, engine) = start("").await;
        frontend.add("a", &prompt, 3, &[]).await;
        assert_eq!(
            frontend.next().await,
            [Bytes::from("ENGINE_CORE_DEAD")],
            "{name}"
        );
        assert!(matches!(engine.await, Ok(Exit::Dead(_))), "{name}");
    }
    let (mut frontend, engine) = start_with("", |mut config| {
        config.timing.speedup = 1.0;
        config
    })
    .await;
    frontend.add("a", &[10], 100, &[]).await;
    frontend.add("a", &[10], 100, &[]).await;
    while frontend.next().await != [Bytes::from("ENGINE_CORE_DEAD")] {}
    assert_eq!(
        engine.await.unwrap(),
        Exit::Dead("duplicate request id a".into())
    );
}

#[tokio::test]
async fn what_deafens_a_real_engine_deafens_this_one() {
    let (mut frontend, _engine) = start("").await;
    assert!(!frontend.is_deaf(SILENCE).await);
    frontend
        .add("a", &[10], 3, &[("top_p", Value::Float(0.0))])
        .await;
    assert!(frontend.is_deaf(SILENCE).await);

    let (mut frontend, _engine) = start("").await;
    frontend.send(0, vec![0xc1]).await;
    assert!(frontend.is_deaf(SILENCE).await);

    let (mut frontend, _engine) = start("").await;
    frontend.send(9, Value::Nil.to_vec()).await;
    assert!(frontend.is_deaf(SILENCE).await);

    // A wrong client index makes it mute for everybody.
    let (mut frontend, _engine) = start("").await;
    let mut fields = add_fields("a", &[10], 3, &[]);
    fields.extend([Value::Nil, Value::Nil, Value::Int(1)]);
    frontend.send(0, Value::Array(fields).to_vec()).await;
    assert!(frontend.is_deaf(SILENCE).await);
}

#[tokio::test]
async fn what_a_real_engine_refuses_alone_is_refused_alone() {
    let (mut frontend, _engine) = start("").await;
    frontend
        .add("a", &[10], 3, &[("max_tokens", Value::Nil)])
        .await;
    let json = Value::map([("json_object", Value::Bool(true))]);
    frontend
        .add("b", &[10], 3, &[("structured_outputs", json)])
        .await;
    for id in ["b"] {
        let answer = frontend.finish(id).await;
        assert_eq!((answer.tokens.len(), answer.finish), (0, Some(3)));
    }
    frontend.add("c", &[10], 3, &[]).await;
    assert_eq!(frontend.finish("c").await.tokens, expected(&[10], 3));
}

#[tokio::test]
async fn faults_come_when_told() {
    let (mut frontend, engine) = start_with("", |config| {
        with_faults(
            config,
            Faults {
                die_after_steps: Some(3),
                ..Faults::default()
            },
        )
    })
    .await;
    frontend.add("a", &[10], 30, &[]).await;
    let mut answer = support::Answer::default();
    loop {
        let message = frontend.next().await;
        if message == [Bytes::from("ENGINE_CORE_DEAD")] {
            break;
        }
        answer.take("a", &message);
    }
    assert_eq!(answer.tokens, expected(&[10], 3));
    assert!(matches!(engine.await, Ok(Exit::Dead(_))));

    let vanish = Faults {
        vanish_after_steps: Some(1),
        ..Faults::default()
    };
    let (mut frontend, engine) = start_with("", |config| with_faults(config, vanish)).await;
    frontend.add("a", &[10], 30, &[]).await;
    assert_eq!(engine.await.unwrap(), Exit::Vanished);

    let deaf = Faults {
        deaf_after_adds: Some(1),
        ..Faults::default()
    };
    let (mut frontend, _engine) = start_with("", |config| with_faults(config, deaf)).await;
    frontend.add("a", &[10], 3, &[]).await;
    frontend.finish("a").await;
    frontend.add("b", &[10], 3, &[]).await;
    assert!(frontend.is_deaf(SILENCE).await);

    let hang = Faults {
        hang_after_steps: Some(1),
        ..Faults::default()
    };
    let (mut frontend, _engine) = start_with("", |config| with_faults(config, hang)).await;
    frontend.add("a", &[10], 3, &[]).await;
    frontend.next().await;
    assert!(frontend.is_deaf(SILENCE).await);
}
