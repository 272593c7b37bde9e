//! From a simulated engine over a relay to a follower, each as it is in production, in one process.

mod support;

use std::{collections::BTreeSet, path::Path, time::Duration};

use stator_common::{nats::Nats, settings::NatsSettings};
use stator_engine::{
    Attach, Config, Engine, Launch, Waits,
    kv_events::{Endpoints, Publisher},
};
use stator_kv_relay::Place;
use stator_sim::{Handle, Sim};
use stator_testkit::{nats::NatsServer, ports, vllm, wait::PATIENCE};
use support::{Known, Outputs, compute, names, on_port, outputs, relay, said};

const BLOCK: usize = 8;

/// A simulated engine with a small cache, and its client.
struct Stage {
    folder: tempfile::TempDir,
    port: u16,
    endpoints: Endpoints,
    publisher: Publisher,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let json = r#"{"vocab_size": 1000, "max_position_embeddings": 4096}"#;
        std::fs::write(folder.path().join("config.json"), json).expect("write");
        let port = ports::free_row(5);
        let loopback = Some([127, 0, 0, 1].into());
        let publisher = Publisher::on_ports(loopback, port + 1, port + 2);
        Self {
            endpoints: publisher.endpoints(None, 0, "127.0.0.1"),
            folder,
            port,
            publisher,
        }
    }

    /// Starts an engine: another life each time.
    async fn engine(&self) -> (Handle, Engine, Outputs) {
        let flags =
            "--max-model-len 64 --num-gpu-blocks-override 17 --block-size 8 --sim-speedup 0";
        let flags = flags.split_whitespace().map(str::to_owned);
        let flags = self.publisher.put_into(&flags.collect::<Vec<_>>());
        let args = ["serve".to_owned(), self.folder.path().display().to_string()]
            .into_iter()
            .chain(vllm::headless(self.port))
            .chain(flags);
        let configs = stator_sim::cli::parse(args).expect("flags");
        let config = configs.expect("no help").into_iter().next();
        let sim = Sim::spawn(config.expect("one engine"));
        let (sink, outputs) = outputs();
        let engine = Engine::start(config_of(self.folder.path(), self.port), sink).await;
        (sim, engine.expect("the engine starts"), outputs)
    }
}

fn config_of(folder: &Path, port: u16) -> Config {
    Config {
        launch: Launch::Attach(Attach {
            bind: format!("127.0.0.1:{port}"),
            advertise: None,
            model: Some(folder.to_owned()),
            args: Vec::new(),
        }),
        run_dir: folder.join("run"),
        keep: false,
        dp_rank: 0,
        lockstep: None,
        vocab_size: None,
        adapters: Vec::new(),
        any_version: false,
        waits: Waits {
            ready: PATIENCE,
            adopt: Duration::ZERO,
            ..Waits::default()
        },
    }
}

#[tokio::test]
async fn a_follower_knows_what_a_simulated_engine_holds_through_the_lives_of_both() {
    let stage = Stage::new();
    let place = on_port(stage.port + 3);
    through_the_lives(&stage, place, nats("nats://localhost:4222")).await;
}

#[tokio::test]
async fn over_nats_a_follower_knows_the_same() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let nats = nats(&server.url());
    through_the_lives(&Stage::new(), at(&nats), nats.clone()).await;
}

#[tokio::test]
async fn a_nats_server_that_starts_again_costs_a_follower_nothing_but_a_moment() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    let stage = Stage::new();
    let (_sim, engine, mut outputs) = stage.engine().await;
    let nats = nats(&server.url());
    let relay = relay(&at(&nats), &stage.endpoints).await;
    let mut known = Known::follow(&relay, nats);
    compute(&engine, &mut outputs, 10..40).await;
    known.until(&names(10..40, BLOCK)).await;
    server.kill();
    compute(&engine, &mut outputs, 200..230).await;
    known.until_lost().await;
    server.restart().await;
    known.until(&said(&stage.endpoints, 2).await).await;
    compute(&engine, &mut outputs, 300..330).await;
    known.until(&said(&stage.endpoints, 3).await).await;
}

fn nats(server: &str) -> Nats {
    let settings = NatsSettings {
        server: vec![server.to_owned()],
        ..NatsSettings::default()
    };
    Nats::new(settings, "test")
}

fn at(nats: &Nats) -> Place {
    Place::Nats {
        nats: nats.clone(),
        name: "test".to_owned(),
    }
}

async fn through_the_lives(stage: &Stage, place: Place, nats: Nats) {
    let (sim, engine, mut outputs) = stage.engine().await;
    let first = relay(&place, &stage.endpoints).await;
    let mut known = Known::follow(&first, nats);

    compute(&engine, &mut outputs, 10..40).await;
    known.until(&names(10..40, BLOCK)).await;
    // More than the cache holds: blocks go as others come.
    for start in (100..400).step_by(50) {
        compute(&engine, &mut outputs, start..start + 50).await;
    }
    let held = said(&stage.endpoints, 7).await;
    assert!(held.len() > 12 && held.is_disjoint(&names(100..150, BLOCK)));
    known.until(&held).await;

    // A relay that is another one knows it all again.
    drop(first);
    known.until_lost().await;
    compute(&engine, &mut outputs, 500..530).await;
    let _second = relay(&place, &stage.endpoints).await;
    known.until(&said(&stage.endpoints, 8).await).await;
    known.resynced().await;
    known.until(&said(&stage.endpoints, 8).await).await;

    // Forgotten at the engine; told with the next step.
    let reset = engine.utility("reset_prefix_cache", &[]).await;
    assert_eq!(reset.expect("answered"), serde_json::json!(true));
    compute(&engine, &mut outputs, 600..630).await;
    known.until(&names(600..630, BLOCK)).await;

    // What that step computes anew is not lost with the rest.
    compute(&engine, &mut outputs, 700..730).await;
    let both = &names(600..630, BLOCK) | &names(700..730, BLOCK);
    known.until(&both).await;
    let reset = engine.utility("reset_prefix_cache", &[]).await;
    assert_eq!(reset.expect("answered"), serde_json::json!(true));
    compute(&engine, &mut outputs, 600..630).await;
    known.until(&names(600..630, BLOCK)).await;

    // An engine that is another one has nothing.
    sim.stop();
    engine.shutdown().await;
    drop(engine);
    let (_sim, engine, mut outputs) = stage.engine().await;
    known.until(&BTreeSet::new()).await;
    compute(&engine, &mut outputs, 10..40).await;
    known.until(&names(10..40, BLOCK)).await;
}
