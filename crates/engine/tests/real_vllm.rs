//! The engine client against a real vLLM. Fails where there is none; `testkit::vllm` says how it is found.
//!
//! An engine takes a quarter of a minute to start, so each test is a story that one engine goes through.

mod support;

use std::time::Duration;

use stator_engine::{
    Attach, DeadReason, Engine, Finish, Launch, Phase, StartError, State, SubmitError, UtilityError,
};
use stator_testkit::process::{self, Signal};
use stator_testkit::vllm::Vllm;
use stator_testkit::{ports, wait};
use support::{Collected, Worker, config, request, spawn_config};

#[tokio::test]
async fn an_engine_streams_aborts_and_its_death_fails_what_runs() {
    let Some(vllm) = Vllm::find() else { return };
    let _turn = support::turn().await;
    let dir = tempfile::tempdir().expect("temporary folder");
    let (state, mut states) = tokio::sync::watch::channel(State::Starting(Phase::Preparing));
    let phases = tokio::spawn(async move {
        let mut seen = Vec::new();
        while states.changed().await.is_ok() {
            let state = states.borrow_and_update().clone();
            let last = matches!(state, State::Dead(_));
            seen.push(state);
            if last {
                break;
            }
        }
        seen
    });
    let (sink, mut collected) = Collected::new();
    let engine = Engine::start_watched(spawn_config(&vllm, dir.path(), false), sink, state)
        .await
        .expect("the engine starts");
    let info = engine.info();
    assert_eq!(
        (info.max_model_len, info.block_size, info.max_num_seqs),
        (2048, 32, 8)
    );
    assert_eq!(info.dp_rank, 0);
    assert!(!info.adopted);

    // Tokens come, the same for the same prompt.
    let first = engine.submit(request("a", 30..100, 8)).expect("submit");
    let second = engine
        .submit(request("a", 30..100, 8))
        .expect("the same id again");
    let (tokens, finish) = collected.finished(first.key()).await;
    assert_eq!((tokens.len(), finish), (8, Finish::Length));
    assert_eq!(collected.finished(second.key()).await.0, tokens);

    // What the engine would not survive is refused, and it goes on.
    let refused = engine
        .submit(request("b", 30..4000, 8))
        .expect_err("too long");
    assert!(matches!(refused, SubmitError::Invalid(_)), "{refused}");
    let supported = engine
        .utility("get_supported_tasks", &[])
        .await
        .expect("utility");
    assert_eq!(supported, serde_json::json!(["generate"]));
    let unknown = engine
        .utility("no_such_method", &[])
        .await
        .expect_err("no such method");
    assert!(matches!(unknown, UtilityError::Failed { .. }), "{unknown}");

    // A dropped handle frees the engine.
    let long = engine
        .submit(request("long", 30..40, 1900))
        .expect("submit");
    collected.tokens_of(long.key()).await;
    collected.running_is(1).await;
    drop(long);
    let after = engine.submit(request("after", 30..40, 4)).expect("submit");
    collected.finished(after.key()).await;
    collected.idle_after_requests(&engine).await;

    // The engine dies; everything that runs fails once, and nothing new is taken.
    let running = [
        engine.submit(request("c", 30..40, 1900)).expect("submit"),
        engine.submit(request("d", 30..50, 1900)).expect("submit"),
    ];
    for handle in &running {
        collected.tokens_of(handle.key()).await;
    }
    let pid = info.pid.expect("a spawned engine has a process");
    process::signal(support::engine_core(pid), Signal::SIGKILL);
    for handle in &running {
        let (_, finish) = collected.finished(handle.key()).await;
        assert_eq!(finish, Finish::Error);
        assert_eq!(
            collected.error(handle.key()).expect("an error").code,
            "engine_dead"
        );
    }
    let dead = support::dead(&engine).await;
    assert!(
        matches!(dead, DeadReason::Exited { .. } | DeadReason::Unreachable),
        "{dead:?}"
    );
    let refused = engine.submit(request("e", 30..40, 4)).expect_err("dead");
    assert!(matches!(refused, SubmitError::Dead), "{refused}");
    assert!(matches!(
        engine.utility("is_sleeping", &[]).await,
        Err(UtilityError::Dead)
    ));
    engine.shutdown().await;
    assert_eq!(process::group_members(pid), Vec::<u32>::new());
    assert_eq!(collected.finishes(running[0].key()), 1);

    let seen = phases.await.expect("phases");
    assert!(
        seen.contains(&State::Starting(Phase::Initializing)),
        "{seen:?}"
    );
    assert!(
        seen.contains(&State::Starting(Phase::LoadingWeights { percent: 100 })),
        "{seen:?}"
    );
    assert!(seen.contains(&State::Ready), "{seen:?}");
}

#[tokio::test]
async fn a_kept_engine_is_adopted_its_orphans_aborted_and_another_fingerprint_ends_it() {
    let Some(vllm) = Vllm::find() else { return };
    let _turn = support::turn().await;
    let dir = tempfile::tempdir().expect("temporary folder");
    // The first worker is killed in the middle of two requests.
    let mut worker = Worker::spawn(&vllm, dir.path(), true);
    let pid = worker.engine_pid().await;
    worker.kill_9();
    assert!(process::is_alive(pid));

    let (sink, mut collected) = Collected::new();
    let engine = Engine::start(spawn_config(&vllm, dir.path(), true), sink)
        .await
        .expect("adopt");
    // The same process: no model was loaded again.
    assert_eq!(engine.info().pid, Some(pid));
    assert!(engine.info().adopted);
    let handle = engine.submit(request("live", 30..100, 8)).expect("submit");
    assert_eq!(collected.finished(handle.key()).await.0.len(), 8);
    // The orphans have 1900 tokens to go; they are gone when the engine says that nothing runs.
    collected.idle_after_requests(&engine).await;

    // Let go of in good order, it lives on, and is adopted once more.
    engine.shutdown().await;
    assert!(process::is_alive(pid));
    let (engine, mut collected) = support::start(spawn_config(&vllm, dir.path(), true)).await;
    assert_eq!(engine.info().pid, Some(pid));
    let handle = engine.submit(request("live", 30..100, 8)).expect("submit");
    assert_eq!(collected.finished(handle.key()).await.0.len(), 8);

    // A second worker cannot have the same directory.
    let mut impatient = spawn_config(&vllm, dir.path(), true);
    impatient.waits.shutdown = Duration::ZERO;
    let (sink, _collected) = Collected::new();
    let refused = Engine::start(impatient, sink).await.expect_err("in use");
    assert!(
        matches!(refused, StartError::RunDirInUse { .. }),
        "{refused}"
    );
    engine.shutdown().await;

    // Started otherwise: the old one ends first, even if the new one comes to nothing.
    let mut other = spawn_config(&vllm, dir.path(), false);
    let Launch::Spawn(spawn) = &mut other.launch else {
        unreachable!("spawned")
    };
    spawn.python = "/bin/false".into();
    let (sink, _collected) = Collected::new();
    let refused = Engine::start(other, sink).await.expect_err("no Python");
    assert!(matches!(refused, StartError::Introspect(_)), "{refused}");
    wait::until("the old engine ends", || !process::is_alive(pid)).await;
}

#[tokio::test]
async fn an_engine_ends_with_its_worker_unless_it_is_kept() {
    let Some(vllm) = Vllm::find() else { return };
    let _turn = support::turn().await;
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut worker = Worker::spawn(&vllm, dir.path(), false);
    let pid = worker.engine_pid().await;
    assert!(!process::group_members(pid).is_empty());
    worker.kill_9();
    wait::until("the engine ends", || process::group_members(pid).is_empty()).await;
}

#[tokio::test]
async fn an_engine_started_by_hand_dials_in_and_finds_the_next_worker_too() {
    let Some(vllm) = Vllm::find() else { return };
    let _turn = support::turn().await;
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let attach = || {
        let launch = Launch::Attach(Attach {
            bind: format!("127.0.0.1:{port}"),
            advertise: None,
            model: Some(vllm.model.clone()),
            args: Vec::new(),
        });
        let mut config = config(launch, dir.path(), false);
        config.waits.probe_interval = Duration::from_millis(200);
        config.waits.probe_deadline = Duration::from_secs(10);
        config
    };
    let by_hand = support::start_by_hand(&vllm, port, dir.path());
    let (engine, mut collected) = support::start(attach()).await;
    assert_eq!(engine.info().pid, None);
    let handle = engine.submit(request("a", 30..100, 8)).expect("submit");
    let (tokens, _) = collected.finished(handle.key()).await;
    engine.shutdown().await;
    drop(engine);

    let (engine, mut collected) = support::start(attach()).await;
    assert!(engine.info().adopted);
    let handle = engine.submit(request("a", 30..100, 8)).expect("submit");
    assert_eq!(collected.finished(handle.key()).await.0, tokens);

    // One that stands still is noticed by its silence: nothing else tells.
    let running = engine.submit(request("b", 30..40, 1900)).expect("submit");
    collected.tokens_of(running.key()).await;
    by_hand.signal(Signal::SIGSTOP);
    let (_, finish) = collected.finished(running.key()).await;
    assert_eq!(finish, Finish::Error);
    let dead = support::dead(&engine).await;
    assert!(matches!(dead, DeadReason::Silent { .. }), "{dead:?}");
}

#[tokio::test]
#[ignore = "the worker process that other tests start and kill"]
async fn a_worker_process() {
    Worker::run().await;
}
