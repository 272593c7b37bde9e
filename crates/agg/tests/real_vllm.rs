//! `stator-agg` as a process around a real vLLM, used through the request plane. Fails where there is no
//! vLLM; `testkit::vllm` says how it is found.
//!
//! An engine takes a quarter of a minute to start, so one engine goes through the whole story.

use std::{path::Path, process::Stdio};

use stator_common::{
    Code,
    discovery::{Discovery, Event, file::Files},
    plane::{Client, ClientConfig, DeltaStream, State},
    proto::worker::{self, FinishReason, GenerateRequest},
};
use stator_testkit::{
    client::{card, outcome, read_to_end, request, submit, until_running},
    process::{self, Signal},
    vllm::{self, Vllm},
};
use tokio::process::{Child, Command};

fn start(vllm: &Vllm, root: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_stator-agg"))
        .arg(&vllm.model)
        .args(["--served-model-name", "tiny", "--drain-grace", "60"])
        .arg("--python")
        .arg(&vllm.python)
        .arg("--run-dir")
        .arg(root.join("run"))
        .arg("--discovery-path")
        .arg(root.join("discovery"))
        .args(vllm::flags())
        .envs(vllm::ENV)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("stator-agg starts")
}

async fn idle(client: &Client, probe: &GenerateRequest) {
    // The load travels with a delay; an answer says that the engine is past what came before.
    outcome(client, probe).await;
    until_running(client, 0).await;
}

#[tokio::test]
async fn a_worker_serves_a_real_engine_through_the_plane_until_it_is_drained() {
    let Some(vllm) = Vllm::find() else { return };
    let root = tempfile::tempdir().expect("temporary folder");
    let mut worker = start(&vllm, root.path());
    let mut watch = Files::new(root.path().join("discovery"))
        .watch()
        .await
        .expect("watch");
    let card = card(&mut watch).await;
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
    let original = std::fs::read(vllm.model.join("tokenizer.json")).expect("read the tokenizer");
    assert_eq!(bytes, original);

    // The same prompt gives the same tokens, alone and in a batch with others.
    let alone = outcome(&client, &request(30..100, 16)).await;
    assert_eq!(alone.finish(), FinishReason::Length);
    assert_eq!(alone.tokens.len(), 16);
    let streams: Vec<DeltaStream> = (0..20)
        .map(|_| submit(&client, &request(30..100, 16)))
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
    let got = outcome(&client, &with_logprobs).await;
    assert_eq!((got.logprobs.len(), got.prompt_logprobs.len()), (4, 9));
    assert_eq!(got.logprobs[0].tokens[0], got.tokens[0]);

    // What would kill the engine is refused with the field, and the engine goes on.
    for (bad, field) in [
        (request([], 4), "prompt"),
        (request([1_000_000], 4), "prompt"),
        (request(30..4000, 4), "prompt"),
        (request(30..40, 0), "max_tokens"),
    ] {
        let refused = outcome(&client, &bad).await;
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
    let mut dropped = submit(&client, &request(30..100, 1900));
    dropped.next().await.expect("a first delta");
    drop(dropped);
    idle(&client, &request(30..100, 1)).await;

    // A deadline ends a request with its own code.
    let mut slow = request(30..100, 1900);
    slow.deadline_ms = Some(50);
    let late = outcome(&client, &slow).await;
    assert_eq!(
        late.error.expect("an error").code(),
        worker::Code::DeadlineExceeded
    );

    // Drain: gone from discovery, nothing new, what runs finishes, status 0.
    let mut running = submit(&client, &request(30..100, 400));
    let first = running.next().await.expect("a first delta");
    process::signal(worker.id().expect("the worker runs"), Signal::SIGTERM);
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
