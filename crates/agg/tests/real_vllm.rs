//! `stator-agg` as a process around a real vLLM, used through the request plane. Fails where there is no
//! vLLM, unless `STATOR_SKIP_REAL=1`.
//!
//! - `STATOR_PYTHON`: the Python that has vLLM; default `.venv/bin/python` in the workspace.
//! - `STATOR_TEST_MODEL`: a tiny model; default `.models/tiny` in the workspace.
//!
//! An engine takes a quarter of a minute to start, so one engine goes through the whole story.

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
};

use stator_common::{
    Card, Code,
    discovery::{Discovery, Event, Watch, file::Files},
    plane::tcp::{Client, ClientConfig, DeltaStream, State, delta},
    proto::worker::{self, Delta, FinishReason, GenerateRequest, Sampling},
};
use tokio::process::{Child, Command};

/// What the engine is started with: small and quick on a CPU.
const ENGINE: &str = "--enforce-eager --max-model-len 2048 --max-num-seqs 8 \
                      --kv-cache-memory-bytes 67108864 --block-size 32";

struct Setup {
    python: PathBuf,
    model: PathBuf,
}

fn setup() -> Option<Setup> {
    if env::var_os("STATOR_SKIP_REAL").is_some_and(|skip| skip == "1") {
        return None;
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = |name, default: &str| {
        env::var_os(name).map_or_else(|| workspace.join(default), PathBuf::from)
    };
    Some(Setup {
        python: path("STATOR_PYTHON", ".venv/bin/python"),
        model: path("STATOR_TEST_MODEL", ".models/tiny"),
    })
}

fn start(setup: &Setup, root: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_stator-agg"))
        .arg(&setup.model)
        .args(["--served-model-name", "tiny", "--drain-grace", "60"])
        .arg("--python")
        .arg(&setup.python)
        .arg("--run-dir")
        .arg(root.join("run"))
        .arg("--discovery-path")
        .arg(root.join("discovery"))
        .args(ENGINE.split_whitespace())
        .env("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("stator-agg starts")
}

fn signal(child: &Child, signal: nix::sys::signal::Signal) {
    let pid = child.id().expect("the worker runs");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal)
        .expect("the worker can be signalled");
}

async fn put(watch: &mut Watch) -> Card {
    match watch.next().await {
        Some(Event::Put(card)) => *card,
        other => panic!("expected a worker, got {other:?}"),
    }
}

fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> GenerateRequest {
    let prompt: Vec<u8> = prompt.into_iter().flat_map(u32::to_le_bytes).collect();
    GenerateRequest {
        request_id: "test".to_owned(),
        prompt_tokens: prompt.into(),
        sampling: Some(Sampling {
            temperature: Some(0.0),
            max_tokens,
            ignore_eos: true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

async fn read_to_end(mut stream: DeltaStream) -> Delta {
    let mut all = Delta::default();
    while let Some(delta) = stream.next().await {
        delta::merge(&mut all, delta);
    }
    all
}

async fn idle(client: &Client, probe: &GenerateRequest) {
    // The load travels with a delay; an answer says that the engine is past what came before.
    read_to_end(client.generate(probe).expect("submit")).await;
    while client.load().running > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_worker_serves_a_real_engine_through_the_plane_until_it_is_drained() {
    let Some(setup) = setup() else { return };
    let root = tempfile::tempdir().expect("temporary folder");
    let mut worker = start(&setup, root.path());
    let mut watch = Files::new(root.path().join("discovery"))
        .watch()
        .await
        .expect("watch");
    let card = put(&mut watch).await;
    assert_eq!(card.model.names, ["tiny"]);
    assert_eq!(
        (card.model.max_model_len, card.model.block_size),
        (2048, 32)
    );
    let client = Client::connect(
        &card.address,
        ClientConfig {
            worker: Some(card.worker.clone()),
            ..ClientConfig::default()
        },
    );
    client.ready().await.expect("connect");

    // The tokenizer comes from the worker.
    let file = &card.model.files["tokenizer.json"];
    let bytes = client.blob(&file.hash).await.expect("fetch the tokenizer");
    let original = std::fs::read(setup.model.join("tokenizer.json")).expect("read the tokenizer");
    assert_eq!(bytes, original);

    // The same prompt gives the same tokens, alone and in a batch with others.
    let alone = read_to_end(client.generate(&request(30..100, 16)).expect("submit")).await;
    assert_eq!(alone.finish(), FinishReason::Length);
    assert_eq!(alone.tokens.len(), 16);
    let streams: Vec<DeltaStream> = (0..20)
        .map(|_| client.generate(&request(30..100, 16)).expect("submit"))
        .collect();
    for stream in streams {
        let again = read_to_end(stream).await;
        assert_eq!(again.tokens, alone.tokens);
        assert!(again.cached_tokens.is_some());
    }

    // Log-probabilities, one row per token; of the prompt, one per token after the first.
    let mut with_logprobs = request(30..40, 4);
    let sampling = with_logprobs.sampling.as_mut().expect("set above");
    sampling.logprobs = Some(2);
    sampling.prompt_logprobs = Some(1);
    sampling.skip_reading_prefix_cache = Some(true);
    let got = read_to_end(client.generate(&with_logprobs).expect("submit")).await;
    assert_eq!((got.logprobs.len(), got.prompt_logprobs.len()), (4, 9));
    assert_eq!(got.logprobs[0].tokens[0], got.tokens[0]);

    // What would kill the engine is refused with the field, and the engine goes on.
    for (bad, field) in [
        (request([], 4), "prompt"),
        (request([1_000_000], 4), "prompt"),
        (request(30..4000, 4), "prompt"),
        (request(30..40, 0), "max_tokens"),
    ] {
        let refused = read_to_end(client.generate(&bad).expect("submit")).await;
        let error = refused.error.expect("an error");
        assert_eq!(
            error.code(),
            worker::Code::InvalidRequest,
            "{}",
            error.message
        );
        assert_eq!(error.field, field, "{}", error.message);
    }

    // A dropped stream frees its place in the engine.
    let mut dropped = client.generate(&request(30..100, 1900)).expect("submit");
    dropped.next().await.expect("a first delta");
    drop(dropped);
    idle(&client, &request(30..100, 1)).await;

    // A deadline ends a request with its own code.
    let mut slow = request(30..100, 1900);
    slow.deadline_ms = Some(50);
    let late = read_to_end(client.generate(&slow).expect("submit")).await;
    assert_eq!(
        late.error.expect("an error").code(),
        worker::Code::DeadlineExceeded
    );

    // Drain: gone from discovery, nothing new, what runs finishes, status 0.
    let mut running = client.generate(&request(30..100, 400)).expect("submit");
    let first = running.next().await.expect("a first delta");
    signal(&worker, nix::sys::signal::Signal::SIGTERM);
    client
        .state()
        .wait_for(|state| matches!(state, State::Draining))
        .await
        .expect("draining");
    let refused = client.generate(&request(30..40, 4)).err().expect("refused");
    assert_eq!(refused.code(), Code::Draining);
    let rest = read_to_end(running).await;
    assert_eq!(first.tokens.len() + rest.tokens.len(), 400);
    assert_eq!(rest.finish(), FinishReason::Length);
    assert_eq!(watch.next().await, Some(Event::Gone(card.worker)));
    let status = worker.wait().await.expect("the worker ends");
    assert!(status.success(), "{status}");
}
