//! The engine client against an engine that says what the test wants: what real ones do too rarely.

mod fake;

use std::{
    collections::HashMap,
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    time::Duration,
};

use fake::{FakeEngine, Told, Value, knock, ready, soon, status};
use stator_engine::{
    Adapter, Attach, Config, DeadReason, Engine, Finish, Launch, Lora, Output, Request, Sampling,
    Simulate, StartError, State, Step, StepSink, SubmitError, Tokens, UtilityError, Waits,
};
use stator_testkit::ports;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

fn config(dir: &Path, port: u16) -> Config {
    Config {
        launch: Launch::Attach(Attach {
            bind: format!("127.0.0.1:{port}"),
            advertise: None,
            model: None,
            args: Vec::new(),
        }),
        run_dir: dir.join("engine-0"),
        keep: false,
        dp_rank: 3,
        lockstep: None,
        vocab_size: Some(100),
        adapters: Vec::new(),
        any_version: false,
        waits: Waits {
            reconnect: Duration::from_secs(30),
            ..Waits::default()
        },
    }
}

fn request(id: &str) -> Request {
    Request {
        id: id.to_owned(),
        prompt: Tokens::from(&[1, 2, 3][..]),
        sampling: Sampling {
            max_tokens: 9,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

fn sink() -> (impl StepSink, UnboundedReceiver<Output>) {
    let (sender, outputs) = unbounded_channel();
    let sink = move |step: Step| {
        for output in step.outputs {
            let _ = sender.send(output);
        }
    };
    (sink, outputs)
}

async fn next(outputs: &mut UnboundedReceiver<Output>) -> Output {
    soon("an output", outputs.recv())
        .await
        .expect("the sink lives")
}

async fn dead(engine: &Engine) -> DeadReason {
    let mut state = engine.state();
    let wait = state.wait_for(|state| matches!(state, State::Dead(_)));
    match &*soon("death", wait).await.expect("a state") {
        State::Dead(reason) => reason.clone(),
        _ => unreachable!("waited for"),
    }
}

/// A worker with its engine.
struct Story {
    engine: Engine,
    fake: FakeEngine,
    outputs: UnboundedReceiver<Output>,
    _dir: tempfile::TempDir,
}

async fn story(change: impl FnOnce(&mut Config)) -> Story {
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let mut config = config(dir.path(), port);
    change(&mut config);
    let (sink, outputs) = sink();
    let ready = ready();
    let start = Engine::start(config, sink);
    let (engine, fake) = tokio::join!(start, FakeEngine::dial(port, &ready));
    Story {
        engine: engine.expect("start"),
        fake,
        outputs,
        _dir: dir,
    }
}

#[tokio::test]
async fn requests_go_out_under_ids_of_their_own_and_outputs_come_back_by_key() {
    let mut story = story(|_| {}).await;
    let info = story.engine.info();
    assert_eq!(
        (info.max_model_len, info.vocab_size, info.dp_rank),
        (2048, 100, 3)
    );
    let first = story.engine.submit(request("a")).expect("submit");
    let second = story.engine.submit(request("a")).expect("submit");
    let ids = [story.fake.added().await, story.fake.added().await];
    assert_eq!(ids[0], first.key().engine_id("a"));
    assert_eq!(ids[1], second.key().engine_id("a"));
    assert_ne!(ids[0], ids[1]);

    // An id that only ends like a live one is nobody's.
    story
        .fake
        .output(&first.key().engine_id("b"), &[7], None)
        .await;
    story.fake.output(&ids[1], &[8, 9], None).await;
    story.fake.output(&ids[0], &[10], Some(1)).await;
    let output = next(&mut story.outputs).await;
    assert_eq!(
        (output.key, output.tokens.as_slice()),
        (second.key(), &[8, 9][..])
    );
    let output = next(&mut story.outputs).await;
    assert_eq!(
        (output.key, output.finish),
        (first.key(), Some(Finish::Length))
    );

    // Only what runs is aborted.
    drop((first, second));
    assert_eq!(
        story.fake.told().await,
        Told::Abort {
            ids: vec![ids[1].clone()]
        }
    );
    let refused = story.engine.submit(Request {
        prompt: Tokens::default(),
        ..request("a")
    });
    assert!(matches!(refused, Err(SubmitError::Invalid(_))));
    let third = story.engine.submit(request("c")).expect("submit");
    assert_eq!(story.fake.added().await, third.key().engine_id("c"));
}

#[tokio::test]
async fn the_engines_death_notice_fails_what_runs_once_and_refuses_the_rest() {
    let mut story = story(|_| {}).await;
    let handle = story.engine.submit(request("a")).expect("submit");
    let id = story.fake.added().await;
    let engine = story.engine.clone();
    let call = tokio::spawn(async move { engine.utility("is_sleeping", &[]).await });
    assert!(matches!(story.fake.told().await, Told::Utility { .. }));
    story.fake.output(&id, &[5], None).await;
    story.fake.say(b"ENGINE_CORE_DEAD".to_vec()).await;
    assert_eq!(next(&mut story.outputs).await.tokens.as_slice(), [5]);
    let last = next(&mut story.outputs).await;
    assert_eq!((last.key, last.finish), (handle.key(), Some(Finish::Error)));
    assert_eq!(last.error.expect("an error").code, "engine_dead");
    assert!(matches!(
        dead(&story.engine).await,
        DeadReason::Reported { .. }
    ));
    assert!(matches!(
        story.engine.submit(request("b")),
        Err(SubmitError::Dead)
    ));
    assert!(matches!(call.await.expect("join"), Err(UtilityError::Dead)));
    drop(handle);
    story.engine.shutdown().await;
    drop(story.engine);
    assert!(
        soon("the end", story.outputs.recv()).await.is_none(),
        "nothing more"
    );
}

#[tokio::test]
async fn a_connection_that_comes_back_fails_what_ran_and_serves_on() {
    let mut story = story(|_| {}).await;
    let handle = story.engine.submit(request("a")).expect("submit");
    let id = story.fake.added().await;
    let addresses = story.fake.addresses.clone();
    drop(story.fake);
    // The worker may notice the loss before or after the return; it must notice it at all.
    let unsent = async {
        loop {
            match story.engine.submit(request("b")) {
                Err(SubmitError::Unsent(_)) => return,
                Err(other) => panic!("{other}"),
                Ok(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    soon("a refusal", unsent).await;
    let mut fake = FakeEngine::connect(&addresses).await;
    let output = loop {
        let output = next(&mut story.outputs).await;
        if output.key == handle.key() {
            break output;
        }
    };
    assert_eq!(output.error.expect("an error").code, "connection_lost");
    match fake.told().await {
        Told::Abort { ids } => assert!(ids.contains(&id)),
        other => panic!("{other:?}"),
    }
    let handle = story.engine.submit(request("c")).expect("submit");
    let id = fake.added().await;
    fake.output(&id, &[6], Some(0)).await;
    let output = next(&mut story.outputs).await;
    assert_eq!(
        (output.key, output.finish),
        (handle.key(), Some(Finish::Stop))
    );
}

#[tokio::test]
async fn a_connection_that_stays_away_is_the_engines_death() {
    let mut story = story(|config| config.waits.reconnect = Duration::from_millis(50)).await;
    let handle = story.engine.submit(request("a")).expect("submit");
    story.fake.added().await;
    drop(story.fake);
    assert_eq!(next(&mut story.outputs).await.finish, Some(Finish::Error));
    assert_eq!(dead(&story.engine).await, DeadReason::Unreachable);
    drop(handle);
}

#[tokio::test]
async fn an_engine_that_answers_lives_and_one_that_does_not_is_dead() {
    let mut story = story(|config| {
        config.waits.probe_interval = Duration::from_millis(20);
        config.waits.probe_deadline = Duration::from_secs(2);
    })
    .await;
    for _ in 0..5 {
        match story.fake.told().await {
            Told::Utility { call_id, method } => {
                assert_eq!(method, "is_scheduler_paused");
                story.fake.answer(call_id).await;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(*story.engine.state().borrow(), State::Ready);
    let handle = story.engine.submit(request("a")).expect("submit");
    assert!(matches!(
        dead(&story.engine).await,
        DeadReason::Silent { .. }
    ));
    assert_eq!(next(&mut story.outputs).await.key, handle.key());
}

#[tokio::test]
async fn an_output_that_cannot_be_read_fails_what_runs_and_the_engine_serves_on() {
    let mut story = story(|_| {}).await;
    let handle = story.engine.submit(request("a")).expect("submit");
    let id = story.fake.added().await;
    story.fake.say(vec![0x92, 0x00]).await;
    let output = next(&mut story.outputs).await;
    assert_eq!(output.error.expect("an error").code, "unreadable_output");
    assert_eq!(story.fake.told().await, Told::Abort { ids: vec![id] });
    drop(handle);
    let handle = story.engine.submit(request("b")).expect("submit");
    assert_eq!(story.fake.added().await, handle.key().engine_id("b"));
}

#[tokio::test]
async fn the_next_worker_finds_the_engine_of_before_and_aborts_its_requests() {
    let mut story = story(|_| {}).await;
    let lost = story.engine.submit(request("same")).expect("submit");
    let lost_id = story.fake.added().await;
    story.engine.shutdown().await;
    let addresses = story.fake.addresses.clone();
    let port = ports::free();
    let Story {
        _dir: dir,
        engine,
        mut fake,
        ..
    } = story;
    // What the shutdown aborted runs on in this engine: as if the worker had been killed.
    assert_eq!(
        fake.told().await,
        Told::Abort {
            ids: vec![lost_id.clone()]
        }
    );
    drop((engine, fake));

    let (sink, mut outputs) = sink();
    let mut config = config(dir.path(), port);
    let record = dir.path().join("engine-0/engine.json");
    let bind = serde_json::from_slice::<serde_json::Value>(&fs::read(record).expect("a record"));
    let bind = bind.expect("JSON")["launch"]["attach"]["bind"].clone();
    let Launch::Attach(attach) = &mut config.launch else {
        unreachable!("attached")
    };
    attach.bind = bind.as_str().expect("an address").to_owned();
    let engine = tokio::spawn(async move { Engine::start(config, sink).await });
    let mut fake = soon("the same addresses", async {
        loop {
            let path = addresses.input.strip_prefix("tcp://").expect("tcp");
            if tokio::net::TcpStream::connect(path).await.is_ok() {
                return FakeEngine::connect(&addresses).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let Told::Utility { call_id, .. } = fake.told().await else {
        panic!("a question first")
    };
    fake.output(&lost_id, &[1], None).await;
    assert_eq!(
        fake.told().await,
        Told::Abort {
            ids: vec![lost_id.clone()]
        }
    );
    fake.answer(call_id).await;
    let engine = engine.await.expect("join").expect("adopt");
    assert!(engine.info().adopted);

    // The same client id again gets an engine id that the old request cannot have.
    let handle = engine.submit(request("same")).expect("submit");
    assert_ne!(handle.key(), lost.key());
    let id = fake.added().await;
    // An orphan that waited until now is aborted too, and only once.
    let late = "other-0000002a";
    fake.output(late, &[1], None).await;
    fake.output(late, &[2], None).await;
    fake.output(&id, &[3], Some(1)).await;
    assert_eq!(
        fake.told().await,
        Told::Abort {
            ids: vec![late.to_owned()]
        }
    );
    assert_eq!(next(&mut outputs).await.key, handle.key());
    drop(handle);
    let _last = engine.submit(request("last")).expect("submit");
    assert!(matches!(fake.told().await, Told::Add { .. }));
}

/// Describes an adapter by the files that it has now.
fn adapter(name: &str, path: &str) -> Adapter {
    let lora = Lora {
        name: name.to_owned(),
        id: 7,
        path: path.to_owned(),
    };
    Adapter::read(lora).expect("readable")
}

/// Starts an engine with adapters; `answers` are what it says to the loading of each, in order.
async fn with_adapters(answers: &[Option<&str>]) -> Result<Engine, StartError> {
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let mut config = config(dir.path(), port);
    config.adapters = ["x", "y"]
        .map(|name| adapter(name, &format!("/adapters/{name}")))
        .into();
    let ready = ready();
    let answer = async {
        let mut fake = FakeEngine::dial(port, &ready).await;
        for failure in answers {
            match fake.told().await {
                Told::Utility { call_id, method } => {
                    assert_eq!(method, "add_lora");
                    fake.reply(call_id, *failure).await;
                }
                other => panic!("{other:?}"),
            }
        }
        fake
    };
    let (engine, _fake) = tokio::join!(Engine::start(config, sink().0), answer);
    engine
}

#[tokio::test]
async fn an_engine_has_started_when_all_of_its_adapters_are_loaded() {
    with_adapters(&[None, None]).await.expect("start");
    let refused = with_adapters(&[None, Some("rank 64 is too much")]).await;
    let error = refused.expect_err("refused").to_string();
    assert!(
        error.contains("`y` from /adapters/y") && error.ends_with("rank 64 is too much"),
        "{error}"
    );
}

#[tokio::test]
async fn no_engine_counts_as_started_whose_adapters_files_were_replaced() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let weights = dir.path().join("adapter_model.safetensors");
    fs::write(&weights, "old").expect("write");
    let port = ports::free();
    let mut config = config(dir.path(), port);
    config.adapters = vec![adapter("x", dir.path().to_str().expect("path"))];
    let ready = ready();
    let replaced = async {
        let mut fake = FakeEngine::dial(port, &ready).await;
        let Told::Utility { call_id, .. } = fake.told().await else {
            panic!("an adapter first")
        };
        fs::write(&weights, "new").expect("write");
        fake.reply(call_id, None).await;
        fake
    };
    let record = config.run_dir.join("engine.json");
    let (started, _fake) = tokio::join!(Engine::start(config.clone(), sink().0), replaced);
    let is_changed = |started: Result<Engine, StartError>| matches!(started, Err(StartError::AdapterChanged { name, .. }) if name == "x");
    assert!(is_changed(started));
    // Nobody adopts it for an engine with the files of before.
    assert!(!record.exists());
    // The next one is not even awaited.
    let again = soon("a refusal", Engine::start(config, sink().0)).await;
    assert!(is_changed(again));
}

#[tokio::test]
async fn nonsense_and_strangers_at_the_handshake_cost_nothing() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let (sink, _outputs) = sink();
    let ready = ready();
    let start = Engine::start(config(dir.path(), port), sink);
    let dial = async {
        let _nonsense = knock(port, 7, b"\xc1 nonsense").await;
        let _early = knock(port, 8, &status("READY")).await;
        let _unknown = knock(port, 9, &status("WHAT")).await;
        FakeEngine::dial(port, &ready).await
    };
    let (engine, _fake) = tokio::join!(start, dial);
    engine.expect("start");
}

#[tokio::test]
async fn an_engine_that_another_version_left_ends_before_the_next_one_starts() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let config = config(dir.path(), port);
    let mut left = std::process::Command::new("sleep")
        .arg("1000")
        .process_group(0)
        .spawn()
        .expect("spawn");
    let started = stator_common::process::start_of(left.id());
    let record = serde_json::json!({
        "format": 99,
        "process": {"pid": left.id(), "started": started},
        "host": stator_common::process::host(),
    });
    fs::create_dir(&config.run_dir).expect("create");
    fs::write(config.run_dir.join("engine.json"), record.to_string()).expect("write");
    let (sink, _outputs) = sink();
    let ready = ready();
    let (engine, _fake) = tokio::join!(Engine::start(config, sink), FakeEngine::dial(port, &ready));
    engine.expect("start");
    let ended = left.try_wait().expect("a child");
    assert!(ended.is_some(), "it runs on");
}

#[tokio::test]
async fn beside_an_engine_that_nobody_can_name_none_is_started() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let config = config(dir.path(), 0);
    let record = config.run_dir.join("engine.json");
    fs::create_dir(&config.run_dir).expect("create");
    fs::write(&record, "{\"format\": 1").expect("write");
    let refused = Engine::start(config, |_: Step| {}).await;
    let StartError::Record { path } = refused.expect_err("refused") else {
        panic!("another reason")
    };
    assert_eq!(path, fs::canonicalize(record).expect("it is left"));
}

async fn refused(ready: HashMap<&'static str, Value>) -> StartError {
    let dir = tempfile::tempdir().expect("temporary folder");
    let port = ports::free();
    let (sink, _outputs) = sink();
    let start = Engine::start(config(dir.path(), port), sink);
    let (engine, _fake) = tokio::join!(start, FakeEngine::dial(port, &ready));
    engine.expect_err("refused")
}

#[tokio::test]
async fn an_engine_of_an_untested_version_or_without_limits_is_refused() {
    let mut newer = ready();
    newer.insert("vllm_version", Value::Text("1.0.0"));
    assert!(matches!(refused(newer).await, StartError::Version(_)));
    for key in ["vllm_version", "max_model_len", "block_size"] {
        let mut lacking = ready();
        lacking.remove(key);
        assert!(matches!(refused(lacking).await, StartError::ReadyLacks(lacks) if lacks == key));
    }
    let mut odd = ready();
    odd.insert("max_model_len", Value::Text("long"));
    assert!(matches!(refused(odd).await, StartError::ReadyResponse(_)));
}

#[tokio::test]
async fn a_start_that_cannot_come_to_anything_says_why() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let start = |change: &dyn Fn(&mut Config)| {
        let mut config = config(dir.path(), 0);
        change(&mut config);
        Engine::start(config, |_: Step| {})
    };
    let wildcard = |config: &mut Config| {
        let Launch::Attach(attach) = &mut config.launch else {
            unreachable!("attached")
        };
        attach.bind = "0.0.0.0:0".to_owned();
    };
    assert!(matches!(
        start(&wildcard).await,
        Err(StartError::NoAdvertisedHost { .. })
    ));
    let hasty = |config: &mut Config| config.waits.ready = Duration::from_millis(50);
    assert!(matches!(
        start(&hasty).await,
        Err(StartError::TimedOut { .. })
    ));

    // A child that ends during its start is quoted.
    let program = dir.path().join("engine");
    fs::write(
        &program,
        "#!/bin/sh\necho starting\necho \"engine: error: no such model: $2\"\nexit 3\n",
    )
    .expect("write");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).expect("chmod");
    let simulate = |program: &Path| {
        let program = program.to_owned();
        move |config: &mut Config| {
            config.launch = Launch::Simulate(Simulate {
                program: program.clone(),
                model: "m".to_owned(),
                args: Vec::new(),
                env: Vec::new(),
            });
        }
    };
    let error = start(&simulate(&program)).await.expect_err("it ends");
    assert!(
        matches!(error, StartError::Died(DeadReason::Exited { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("exit status: 3"), "{error}");
    assert!(
        error
            .to_string()
            .contains("engine: error: no such model: m"),
        "{error}"
    );
    let error = start(&simulate(&dir.path().join("nothing")))
        .await
        .expect_err("no program");
    assert!(matches!(error, StartError::Spawn { .. }), "{error}");
}
