//! A worker that serves LoRA adapters beside its model, with simulated engines.

mod support;

use std::path::Path;

use stator_common::proto::worker;
use stator_testkit::client::{outcome, request};
use stator_worker::Config;

use support::{Cluster, code};

fn adapter() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    std::fs::write(folder.path().join("adapter_config.json"), "{\"r\": 4}").expect("write");
    folder
}

/// Has a worker serve an adapter as `x`.
fn serve(path: &Path) -> impl FnOnce(&mut Config) + use<> {
    let module = format!("x={}", path.display());
    move |config| {
        let flags = ["--enable-lora", "--lora-modules", &module];
        config.engine_args = flags.map(str::to_owned).into();
    }
}

#[tokio::test]
async fn an_adapter_is_on_the_card_and_answers_otherwise_than_the_model() {
    let folder = adapter();
    let mut cluster = Cluster::start(serve(folder.path())).await;
    let dying = cluster.engine(0, "--enable-lora --sim-speedup 0 --sim-die-after-steps 100");
    let card = cluster.card().await;
    let [x] = &card.adapters[..] else {
        panic!("one adapter: {card:?}")
    };
    assert_eq!((&x.name[..], &x.parent[..]), ("x", "m"));
    assert_eq!(
        Path::new(&x.root),
        folder.path().canonicalize().expect("it is there")
    );

    let client = cluster.client().await;
    let of = |lora: &str, tokens| worker::GenerateRequest {
        lora: lora.to_owned(),
        ..request(1..9, tokens)
    };
    let base = outcome(&client, &of("", 9)).await.tokens;
    let adapted = outcome(&client, &of("x", 9)).await.tokens;
    assert_eq!((base.len(), adapted.len()), (9, 9));
    assert_ne!(base, adapted);
    let unknown = outcome(&client, &of("y", 9)).await;
    // Another worker may have it.
    assert_eq!(code(&unknown), worker::Code::Unavailable);
    let error = unknown.error.expect("an error");
    assert!(
        error.untouched && error.field == "model" && error.message.contains("'y'"),
        "{error:?}"
    );

    // The next engine has it, too.
    outcome(&client, &of("x", 4000)).await;
    drop(dying);
    let gone = cluster.watch.next().await;
    assert!(gone.is_some_and(|event| matches!(event, stator_common::discovery::Event::Gone(_))));
    let _next = cluster.engine(0, "--enable-lora --sim-speedup 0");
    assert_eq!(cluster.card().await, card);
    assert_eq!(outcome(&client, &of("x", 9)).await.tokens, adapted);
}

#[tokio::test]
async fn a_worker_ends_rather_than_serve_other_files_under_the_name_that_it_is_known_for() {
    let folder = adapter();
    let mut cluster = Cluster::start(serve(folder.path())).await;
    let dying = cluster.engine(0, "--enable-lora --sim-speedup 0 --sim-die-after-steps 20");
    cluster.card().await;
    let client = cluster.client().await;
    std::fs::write(folder.path().join("adapter_model.safetensors"), "new").expect("write");
    outcome(&client, &request(1..9, 400)).await;
    drop(dying);
    let error = format!("{:#}", cluster.failed().await);
    assert!(
        error.contains("adapter `x`") && error.contains("start the worker again"),
        "{error}"
    );
}

#[tokio::test]
async fn a_worker_whose_engine_does_not_load_an_adapter_ends() {
    let folder = adapter();
    let cluster = Cluster::start(serve(folder.path())).await;
    let _engine = cluster.engine(0, "--sim-speedup 0");
    let error = format!("{:#}", cluster.failed().await);
    assert!(
        error.contains("adapter `x`") && error.contains("--enable-lora"),
        "{error}"
    );
}
