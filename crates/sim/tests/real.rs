//! One scenario, on the simulator and on a real vLLM engine: what a frontend can see is the same.
//!
//! Fails where there is no vLLM; `testkit::vllm` says how it is found.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Stdio;

use stator_sim::wire::WireVersion;
use stator_sim::wire::msgpack::Value;
use stator_sim::{Sim, cli};
use stator_testkit::process::Group;
use stator_testkit::vllm::{self, Vllm};
use support::{Frontend, Subscriber, trace};

const FLAGS: &str = "--enforce-eager --max-model-len 1216 --max-num-seqs 8 --max-num-batched-tokens 2048 \
    --kv-cache-memory-bytes 67108864 --block-size 32 --num-gpu-blocks-override 40";

fn flags(model: &Path, port: u16, events: &Path) -> Vec<String> {
    let socket = |name: &str| format!("ipc://{}", events.join(name).display());
    let events = format!(
        r#"{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"{}","replay_endpoint":"{}"}}"#,
        socket("events"),
        socket("replay"),
    );
    let mut flags: Vec<String> = vec!["serve".into(), model.display().to_string()];
    flags.extend(vllm::headless(port));
    flags.extend(FLAGS.split_whitespace().map(str::to_owned));
    flags.extend(["--kv-events-config".into(), events]);
    flags
}

/// Returns how many tokens the model knows.
fn vocab_size(model: &Path) -> u32 {
    let config = std::fs::read(model.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    u32::try_from(config["vocab_size"].as_u64().unwrap()).unwrap()
}

/// A request: its id, prompt, `max_tokens` and further sampling parameters.
type Step = (&'static str, Vec<u32>, u32, Vec<(&'static str, Value)>);

/// Everything a frontend sees of the scenario, line by line.
async fn scenario(frontend: &mut Frontend, vocab_size: u32) -> Vec<String> {
    let mut lines = Vec::new();
    let ready = frontend.ready.clone();
    for key in [
        "max_model_len",
        "num_gpu_blocks",
        "block_size",
        "max_num_seqs",
        "supports_lora",
    ] {
        lines.push(format!("ready: {key} {:?}", ready.get(key)));
    }
    let mut subscriber = Subscriber::connect(&ready).await;
    let range = |from: u32, to: u32| (from..to).collect::<Vec<u32>>();
    let scattered = |step: u32, len: u32| (0..len).map(|x| x * step % 400 + 10).collect::<Vec<_>>();
    // Whatever comes first, stops: the two do not choose the same tokens.
    let all_tokens = ("stop_token_ids", Value::from(range(0, vocab_size)));
    let salted = |mut fields: Vec<Value>| {
        fields[7] = "tenant".into();
        fields
    };
    let steps: Vec<Step> = vec![
        ("short", range(30, 110), 3, vec![]),
        ("cached", range(30, 110), 3, vec![]),
        (
            "logprobs",
            range(30, 110),
            2,
            vec![("logprobs", Value::Int(2))],
        ),
        (
            "all-logprobs",
            range(30, 45),
            1,
            vec![("logprobs", Value::Int(-1))],
        ),
        (
            "prompt-logprobs",
            range(30, 45),
            1,
            vec![("prompt_logprobs", Value::Int(1))],
        ),
        (
            "long-prompt-logprobs",
            range(30, 130),
            1,
            vec![("prompt_logprobs", Value::Int(3))],
        ),
        ("no-max", range(30, 45), 1, vec![("max_tokens", Value::Nil)]),
        (
            "no-backend",
            range(30, 45),
            1,
            vec![(
                "structured_outputs",
                Value::map([("json_object", Value::Bool(true))]),
            )],
        ),
        ("stop", range(30, 62), 3, vec![all_tokens.clone()]),
        ("two-blocks", range(100, 164), 2, vec![]),
        ("two-blocks-again", range(100, 164), 2, vec![]),
        ("fills-a-block", range(200, 230), 40, vec![]),
        ("evicts", scattered(7, 1000), 2, vec![]),
        ("evicts-more", scattered(11, 1000), 2, vec![]),
        ("evicted", range(30, 110), 1, vec![]),
        ("model-len", scattered(13, 1210), 50, vec![]),
    ];
    for (id, prompt, max_tokens, params) in steps {
        // `no-max` names max_tokens twice; the second wins, as in a dictionary.
        let mut fields = support::add_fields(id, &prompt, max_tokens, &params);
        if id == "no-max" {
            let Value::Map(sampling) = &mut fields[3] else {
                unreachable!()
            };
            sampling.retain(|(key, value)| key.as_str() != Some("max_tokens") || value.is_nil());
        }
        if id == "two-blocks-again" {
            fields = salted(fields);
        }
        frontend.send(0, Value::Array(fields).to_vec()).await;
        let answer = frontend.finish(id).await;
        lines.extend(
            trace::answer(&answer)
                .into_iter()
                .map(|line| format!("{id}: {line}")),
        );
    }

    // Two that do not fit together: the one that came last gives way. They start in one step, or
    // what happens later would depend on how many tokens lie between them.
    let pause = vec!["keep".into(), Value::Bool(false)];
    lines.push(format!(
        "keep: {:?}",
        frontend.call("pause_scheduler", pause).await
    ));
    frontend.add("p", &scattered(3, 600), 60, &[]).await;
    frontend.add("q", &scattered(5, 600), 60, &[]).await;
    frontend.post("resume_scheduler", vec![]).await;
    let (mut p, mut q) = (support::Answer::default(), support::Answer::default());
    while p.finish.is_none() || q.finish.is_none() {
        let message = frontend.next().await;
        p.take("p", &message);
        q.take("q", &message);
    }
    let preempted = |answer: &support::Answer| {
        trace::answer(answer)
            .iter()
            .any(|line| line.contains("events [3, 2]"))
    };
    lines.push(format!(
        "p: {} tokens, preempted {}",
        p.tokens.len(),
        preempted(&p)
    ));
    lines.push(format!(
        "q: {} tokens, preempted {}",
        q.tokens.len(),
        preempted(&q)
    ));

    // An abort is silent, whether of a live request or of none.
    frontend.add("gone", &range(30, 60), 1000, &[]).await;
    frontend.next().await;
    frontend.abort(&["gone", "unknown"]).await;
    let lora = Value::Array(vec!["x".into(), Value::Int(1), "/nope".into(), Value::Nil]);
    for (method, args) in [
        ("is_scheduler_paused", vec![]),
        (
            "reset_prefix_cache",
            vec![Value::Bool(false), Value::Bool(false)],
        ),
        ("get_supported_tasks", vec![]),
        ("list_loras", vec![]),
        ("add_lora", vec![lora]),
        ("is_sleeping", vec![]),
        ("no_such_method", vec![]),
        ("get_kv_cache_group_metadata", vec![]),
        ("pause_scheduler", vec!["abort".into(), Value::Bool(true)]),
        ("is_scheduler_paused", vec![]),
        ("pause_scheduler", vec!["never".into()]),
        ("resume_scheduler", vec![]),
        ("sleep", vec![Value::Int(0), "abort".into()]),
        ("is_sleeping", vec![]),
        ("wake_up", vec![Value::Nil]),
        ("is_sleeping", vec![]),
        ("get_weight_version", vec![]),
        ("reset_mm_cache", vec![]),
        ("reset_encoder_cache", vec![]),
        ("collective_rpc", vec!["nope".into()]),
        ("is_sleeping", vec![Value::Int(1)]),
    ] {
        let result = frontend.call(method, args).await;
        lines.push(format!("{method}: {result:?}"));
    }
    frontend.add("after-reset", &range(30, 110), 2, &[]).await;
    let mut gone = support::Answer::default();
    let mut after = support::Answer::default();
    while after.finish.is_none() {
        let message = frontend.next().await;
        gone.take("gone", &message);
        after.take("after-reset", &message);
    }
    lines.push(format!("gone: finish {:?}", gone.finish));
    lines.extend(
        trace::answer(&after)
            .into_iter()
            .map(|line| format!("after-reset: {line}")),
    );

    // A pause in mode `abort` does say what it ended.
    frontend.add("paused", &range(30, 60), 1000, &[]).await;
    frontend.next().await;
    let pause = frontend
        .post("pause_scheduler", vec!["abort".into(), Value::Bool(true)])
        .await;
    let paused = frontend.finish("paused").await;
    lines.push(format!("paused: finish {:?}", paused.finish));
    lines.push(format!("pause: {:?}", frontend.answer_to(pause).await));
    frontend.add("waits", &range(30, 60), 2, &[]).await;
    frontend.post("resume_scheduler", vec![]).await;
    let waits = frontend.finish("waits").await;
    lines.push(format!(
        "waits: {} tokens, finish {:?}",
        waits.tokens.len(),
        waits.finish
    ));

    let published = subscriber.replay(0).await;
    lines.extend(
        trace::events(&published)
            .into_iter()
            .map(|line| format!("events: {line}")),
    );

    frontend.add("empty", &[], 2, &[]).await;
    let mut last = frontend.next().await;
    while last.len() != 1 || last[0].as_ref() != b"ENGINE_CORE_DEAD" {
        last = frontend.next().await;
    }
    lines.push("empty: the engine is dead".into());
    lines
}

#[tokio::test]
async fn a_frontend_cannot_tell_the_simulator_from_a_real_engine() {
    let Some(vllm) = Vllm::find() else { return };
    let vocab_size = vocab_size(&vllm.model);

    let sockets = tempfile::tempdir().unwrap();
    let mut frontend = Frontend::bind().await;
    let log = std::fs::File::create(sockets.path().join("log")).unwrap();
    let mut command = vllm.command();
    command
        .args(flags(&vllm.model, frontend.port, sockets.path()))
        // Compiling for log-probabilities takes longer than all the rest.
        .env("TORCH_COMPILE_DISABLE", "1")
        .stdout(log.try_clone().unwrap())
        .stderr(Stdio::from(log));
    let real = Group::spawn(&mut command);
    frontend.greet().await;
    let real_lines = scenario(&mut frontend, vocab_size).await;
    drop(real);

    let sockets = tempfile::tempdir().unwrap();
    let mut frontend = Frontend::bind().await;
    let configs = cli::parse(flags(&vllm.model, frontend.port, sockets.path()).into_iter())
        .unwrap()
        .unwrap();
    let mut config = configs.into_iter().next().unwrap();
    config.wire = WireVersion::V0_32;
    // As far from a real pace as an abort needs.
    config.timing.speedup = 10.0;
    let _sim = Sim::spawn(config);
    frontend.greet().await;
    let sim_lines = scenario(&mut frontend, vocab_size).await;

    let differ = real_lines
        .iter()
        .zip(&sim_lines)
        .filter(|(real, sim)| real != sim);
    let differ: Vec<String> = differ
        .map(|(real, sim)| format!("real {real}\n sim {sim}"))
        .collect();
    assert!(
        differ.is_empty() && real_lines.len() == sim_lines.len(),
        "{} lines and {}:\n{}",
        real_lines.len(),
        sim_lines.len(),
        differ.join("\n")
    );
}
