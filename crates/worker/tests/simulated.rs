//! A worker in this process, with simulated engines that dial in over vLLM's wire.

mod support;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use async_trait::async_trait;
use stator_agg::Agg;
use stator_common::{
    Card, Code,
    card::Role,
    discovery::{Discovery, DiscoveryError, Event, Peer, Registration, Watch, mem::Mem},
    plane::{Client, ClientConfig, DeltaStream},
    proto::worker::{self, FinishReason},
    telemetry::Telemetry,
};
use stator_testkit::{
    client::{outcome, read_to_end, request, submit, until_running},
    ports,
};
use stator_worker::Worker;

use support::{Cluster, code, config, model};

#[tokio::test]
async fn what_the_engine_generates_reaches_every_processor() {
    let mut cluster = Cluster::start(|_| {}).await;
    assert_eq!(cluster.get("/health").await.0, 503);
    assert_eq!(cluster.get("/live").await.0, 200);
    // Early processors are told to wait.
    let early = cluster.client().await;
    assert_eq!(
        code(&outcome(&early, &request(1..9, 4)).await),
        worker::Code::Unavailable
    );

    let _engine = cluster.engine(0, "--sim-speedup 0 --block-size 32 --max-logprobs 7");
    let card = cluster.card().await;
    assert_eq!(card.address, cluster.address);
    assert_eq!(card.model.names, ["m", "alias"]);
    assert_eq!((card.model.vocab_size, card.model.block_size), (1000, 32));
    let tokenizer = &card.model.files["tokenizer.json"];
    assert_eq!(
        &early.blob(&tokenizer.hash).await.expect("a file")[..],
        b"{}"
    );
    assert_eq!(cluster.get("/health").await.0, 200);

    let late = cluster.client().await;
    let first = outcome(&early, &request(1..200, 50)).await;
    assert_eq!(
        (first.tokens.len(), first.finish()),
        (50, FinishReason::Length)
    );
    let streams: Vec<DeltaStream> = [&early, &late]
        .into_iter()
        .flat_map(|client| (0..50).map(|_| submit(client, &request(1..200, 50))))
        .collect();
    for stream in streams {
        let delta = read_to_end(stream).await;
        assert_eq!(delta.tokens, first.tokens);
        assert_eq!(delta.cached_tokens, Some(192));
    }
    let (_, status) = cluster.get("/status").await;
    assert!(status.contains("\"state\":\"ready\""), "{status}");
    assert!(status.contains("\"generated_tokens\":5050"), "{status}");
}

#[tokio::test]
async fn what_a_client_gives_up_is_aborted_in_the_engine() {
    let (cluster, _engine, _, client) = Cluster::serving("").await;
    let mut dropped = submit(&client, &request(1..9, 4000));
    dropped.next().await.expect("a first delta");
    cluster.until_requests(1).await;
    drop(dropped);
    cluster.until_requests(0).await;

    // What was the engine's only work is off its load, though no step says so.
    until_running(&client, 0).await;

    // A processor that is lost gives up everything at once.
    let address = cluster.address.clone();
    let processor = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    processor.spawn(async move {
        let client = Client::connect(address, ClientConfig::default());
        client.ready().await.expect("connect");
        let _streams: Vec<DeltaStream> = (0..10)
            .map(|_| submit(&client, &request(1..9, 4000)))
            .collect();
        std::future::pending::<()>().await;
    });
    cluster.until_requests(10).await;
    processor.shutdown_background();
    cluster.until_requests(0).await;
    until_running(&client, 0).await;
}

#[tokio::test]
async fn an_engine_that_dies_takes_its_streams_along_and_the_next_one_is_welcome() {
    let (mut cluster, dying, card, client) = Cluster::serving("--sim-die-after-steps 20").await;
    let cut = outcome(&client, &request(1..9, 4000)).await;
    assert_eq!(code(&cut), worker::Code::EngineDead);
    assert!(!cut.tokens.is_empty());
    assert_eq!(
        cluster.watch.next().await,
        Some(Event::Gone(card.worker.clone()))
    );
    drop(dying);

    let _next = cluster.engine(0, "--sim-speedup 0");
    assert_eq!(cluster.card().await, card);
    let whole = outcome(&client, &request(1..9, 20)).await;
    assert_eq!(whole.tokens.len(), 20);
}

/// A place that takes the first registration, refuses the second, and takes all others.
#[derive(Default)]
struct Moody {
    place: Mem,
    registrations: AtomicU32,
}

#[async_trait]
impl Discovery for Moody {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        if self.registrations.fetch_add(1, Ordering::SeqCst) == 1 {
            return Err(DiscoveryError::Io {
                action: "write",
                path: "/full".into(),
                source: io::ErrorKind::StorageFull.into(),
            });
        }
        self.place.register(card).await
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        self.place.watch().await
    }

    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError> {
        self.place.join(peer).await
    }

    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError> {
        self.place.peers().await
    }

    fn name(&self) -> String {
        self.place.name()
    }
}

#[tokio::test]
async fn a_worker_that_was_known_once_goes_on_trying_to_be_known_again() {
    let mut cluster = Cluster::start_in(Moody::default(), |_| {}).await;
    let dying = cluster.engine(0, "--sim-die-after-steps 20");
    let card = cluster.card().await;
    let client = cluster.client().await;
    outcome(&client, &request(1..9, 4000)).await;
    let gone = Some(Event::Gone(card.worker.clone()));
    assert_eq!(cluster.watch.next().await, gone);
    drop(dying);
    let _next = cluster.engine(0, "--sim-speedup 0");
    assert_eq!(cluster.card().await, card);
}

#[tokio::test]
async fn a_deadline_ends_a_request_with_its_own_code() {
    let (cluster, _engine, _, client) = Cluster::serving("").await;
    let mut slow = request(1..9, 4000);
    slow.deadline_ms = Some(30);
    let late = outcome(&client, &slow).await;
    assert_eq!(code(&late), worker::Code::DeadlineExceeded);
    cluster.until_requests(0).await;
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let (mut cluster, _engine, card, client) = Cluster::serving("--sim-speedup 10").await;
    let running = submit(&client, &request(1..9, 300));
    cluster.until_requests(1).await;
    cluster.trigger.drain();
    assert_eq!(cluster.watch.next().await, Some(Event::Gone(card.worker)));
    // One that has not heard of it yet is refused all the same.
    match client.generate(&request(1..9, 4)) {
        Ok(stream) => assert_eq!(code(&read_to_end(stream).await), worker::Code::Draining),
        Err(error) => assert_eq!(error.code(), Code::Draining),
    }
    let whole = read_to_end(running).await;
    assert_eq!(
        (whole.tokens.len(), whole.finish()),
        (300, FinishReason::Length)
    );
    cluster.ended().await;
}

#[tokio::test]
async fn what_outlives_the_grace_period_may_go_on_elsewhere() {
    let (cluster, _engine, _, client) = Cluster::serving("").await;
    let running = submit(&client, &request(1..9, 4000));
    cluster.until_requests(1).await;
    cluster.trigger.drain();
    cluster.trigger.abort();
    let cut = read_to_end(running).await;
    assert_eq!(code(&cut), worker::Code::Draining);
    assert!(Code::from(code(&cut)).is_retryable());
    cluster.ended().await;
}

#[tokio::test]
async fn every_rank_is_a_target_of_its_own() {
    let mut cluster = Cluster::start(|config| config.data_parallel_size = 2).await;
    let _engines = [cluster.engine(0, ""), cluster.engine(1, "")];
    let card = cluster.card().await;
    assert_eq!(card.model.dp_size, 2);
    let client = cluster.client().await;
    for rank in [0, 1] {
        let mut to_rank = request(1..100, 2);
        to_rank.dp_rank = Some(rank);
        // Each rank has a prefix cache of its own: the first request finds nothing in it.
        assert_eq!(outcome(&client, &to_rank).await.cached_tokens, Some(0));
    }
    let mut nowhere = request(1..9, 2);
    nowhere.dp_rank = Some(2);
    let refused = outcome(&client, &nowhere).await;
    assert_eq!(code(&refused), worker::Code::InvalidRequest);
    assert_eq!(refused.error.expect("an error").field, "dp_rank");
    // Without a rank, requests spread.
    let _streams: Vec<DeltaStream> = (0..4)
        .map(|_| submit(&client, &request(1..9, 4000)))
        .collect();
    until_running(&client, 4).await;
}

#[tokio::test]
async fn what_the_engine_would_not_survive_is_refused_and_it_goes_on() {
    let (_cluster, _engine, _, client) = Cluster::serving("--sim-speedup 0").await;
    let mut hot = request(1..9, 4);
    hot.sampling.as_mut().expect("set").temperature = Some(-1.0);
    let mut torn = request(1..9, 4);
    torn.prompt_tokens = vec![1, 2, 3].into();
    let mut bare = request(1..9, 4);
    bare.sampling = None;
    for (bad, field) in [
        (request(1..1, 4), "prompt"),
        (request(999..1001, 4), "prompt"),
        (hot, "temperature"),
        (torn, "prompt_tokens"),
        (bare, "sampling"),
    ] {
        let error = outcome(&client, &bad).await.error.expect("an error");
        assert_eq!(error.code(), worker::Code::InvalidRequest);
        assert_eq!(error.field, field);
    }
    assert_eq!(outcome(&client, &request(1..9, 4)).await.tokens.len(), 4);
}

#[tokio::test]
async fn a_listener_beyond_loopback_needs_a_token() {
    let model = model();
    let open = |token: bool| {
        let mut config = config(model.path(), ports::free_row(1));
        config.host = "0.0.0.0".to_owned();
        config.plane_token = token.then(|| stator_worker::config::Secret::from("secret"));
        let discovery = std::sync::Arc::new(Mem::default());
        Worker::bind_in(
            config,
            Role::Agg,
            Arc::new(Agg),
            Telemetry::detached(),
            discovery,
        )
    };
    let error = open(false).await.err().expect("refused").to_string();
    assert!(error.contains("--plane-token-file"), "{error}");
    open(true).await.expect("bound");
}
