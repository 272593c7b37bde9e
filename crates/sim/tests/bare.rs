//! The simulated engine, driven by a bare client over real sockets.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use bytes::Bytes;
use stator_sim::request::Sampling;
use stator_sim::wire::WireVersion;
use stator_sim::wire::msgpack::Value;
use stator_sim::{Config, Exit, Faults, Handle, Sim};
use support::{Frontend, Subscriber, add_fields, config, with_faults, with_wire};

/// Short enough to prove silence without waiting long: an engine without pace answers in
/// microseconds.
const SILENCE: Duration = Duration::from_millis(400);

async fn start(flags: &str) -> (Frontend, Handle) {
    start_with(flags, |config| config).await
}

async fn start_with(flags: &str, change: impl FnOnce(Config) -> Config) -> (Frontend, Handle) {
    let mut frontend = Frontend::bind().await;
    let engine = Sim::spawn(change(config(frontend.port, flags)));
    assert_eq!(frontend.greet().await, ["HELLO", "READY"]);
    (frontend, engine)
}

/// What the model says, computed without an engine.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let model = config(1, "").model;
    let mut chain = model.start(None).extend_all(prompt);
    let mut output = Vec::new();
    for _ in 0..count {
        output.push(model.next(chain, &Sampling::default(), &output));
        chain = chain.extend(output[output.len() - 1]);
    }
    output
}

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
async fn kv_events_tell_what_is_cached_and_are_told_again() {
    let events = "--num-gpu-blocks-override 65 --kv-events-config \
        {\"enable_kv_cache_events\":true,\"endpoint\":\"tcp://*:0\",\"replay_endpoint\":\"tcp://*:0\"}";
    let (mut frontend, _engine) = start(events).await;
    let ready = frontend.ready.clone();
    let mut subscriber = Subscriber::connect(&ready).await;
    let prompt: Vec<u32> = (10..30).collect();
    // A subscription takes its time to arrive; the first batch is fetched again.
    frontend.add("a", &prompt, 12, &[]).await;
    frontend.finish("a").await;
    frontend.call("reset_prefix_cache", vec![]).await.unwrap();
    frontend.add("b", &prompt, 1, &[]).await;
    assert_eq!(
        frontend.finish("b").await.prefill("num_cached_tokens"),
        Some(0)
    );
    frontend.add("c", &prompt, 1, &[]).await;
    assert_eq!(
        frontend.finish("c").await.prefill("num_cached_tokens"),
        Some(16)
    );

    let batches = subscriber.replay(0).await;
    let all: Vec<&Value> = batches.iter().flat_map(|(_, events)| events).collect();
    let kind = |event: &Value| event.get("type").unwrap().as_str().unwrap().to_owned();
    let kinds: Vec<String> = all.iter().map(|event| kind(event)).collect();
    assert_eq!(
        kinds,
        [
            "BlockStored",
            "BlockStored",
            "AllBlocksCleared",
            "BlockStored"
        ]
    );
    let hashes = |event: &Value| {
        event
            .get("block_hashes")
            .unwrap()
            .as_array()
            .unwrap()
            .to_vec()
    };
    assert_eq!(hashes(all[0]).len(), 2);
    assert_eq!(
        all[0].get("token_ids"),
        Some(&Value::from(prompt[..16].to_vec()))
    );
    assert_eq!(all[0].get("parent_block_hash"), None);
    assert_eq!(all[1].get("parent_block_hash"), Some(&hashes(all[0])[1]));
    assert_eq!(all[0].get("block_size"), Some(&Value::Int(8)));
    assert_eq!(hashes(all[3]), hashes(all[0]));
    let numbers: Vec<u64> = batches.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(numbers, (0..batches.len() as u64).collect::<Vec<_>>());
    assert_eq!(subscriber.replay(2).await.len(), batches.len() - 2);

    let other: Vec<u32> = (30..60).collect();
    frontend.add("d", &other, 1, &[]).await;
    while subscriber.next().await.0 != batches.len() as u64 {}
}

const NIXL: &str =
    "--kv-transfer-config {\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\"}";

fn transfer(params: Value) -> (&'static str, Value) {
    ("extra_args", Value::map([("kv_transfer_params", params)]))
}

fn produce() -> (&'static str, Value) {
    transfer(Value::map([
        ("do_remote_decode", Value::Bool(true)),
        ("do_remote_prefill", Value::Bool(false)),
    ]))
}

#[tokio::test]
async fn a_prompt_prefilled_in_one_engine_is_decoded_in_another() {
    let (mut prefill, _p) = start(NIXL).await;
    let (mut decode, _d) = start(NIXL).await;
    let prompt: Vec<u32> = (4..24).collect();
    prefill.add("p", &prompt, 1, &[produce()]).await;
    let first = prefill.finish("p").await;
    let params = first.kv_transfer_params().unwrap();
    assert_eq!(params.get("do_remote_prefill"), Some(&Value::Bool(true)));
    assert_eq!(params.get("remote_num_tokens"), Some(&Value::Int(20)));
    // Kept blocks are in use.
    assert_eq!(
        prefill.call("reset_prefix_cache", vec![]).await,
        Ok(Value::Bool(false))
    );

    decode
        .add("d", &prompt, 6, &[transfer(params.clone())])
        .await;
    let answer = decode.finish("d").await;
    assert_eq!(answer.tokens, expected(&prompt, 6));
    assert_eq!(answer.tokens[0], first.tokens[0]);
    assert_eq!(answer.prefill("num_external_cached_tokens"), Some(20));
    assert_eq!(answer.prefill("num_computed_tokens"), Some(0));
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::task::yield_now().await;
    }

    // It can be fetched once.
    decode
        .add("again", &prompt[..10], 6, &[transfer(params)])
        .await;
    tokio::time::pause();
    let again = decode.finish("again").await;
    assert_eq!((again.tokens.len(), again.finish), (0, Some(3)));
}

#[tokio::test]
async fn kv_that_nobody_fetches_is_given_back_and_then_unknown() {
    let (mut prefill, _p) = start(&format!("{NIXL} --sim-kv-lease-ms 1")).await;
    let (mut decode, _d) = start(&format!("{NIXL} --sim-kv-failure-ms 1")).await;
    prefill.add("p", &[10, 11], 1, &[produce()]).await;
    let params = prefill.finish("p").await.kv_transfer_params().unwrap();
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    decode.add("d", &[10, 11], 6, &[transfer(params)]).await;
    assert_eq!(decode.finish("d").await.finish, Some(3));
}

#[tokio::test]
async fn kv_of_a_refused_request_is_freed_by_an_add_that_aborts_at_once() {
    let (mut prefill, _p) = start(NIXL).await;
    let (mut decode, _d) = start(NIXL).await;
    prefill.add("p", &[10, 11], 1, &[produce()]).await;
    let params = prefill.finish("p").await.kv_transfer_params().unwrap();
    let mut fields = add_fields("d", &[0], 1, &[transfer(params)]);
    fields.resize(19, Value::Nil);
    fields.push(Value::Bool(true));
    decode.send(0, Value::Array(fields).to_vec()).await;
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
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
