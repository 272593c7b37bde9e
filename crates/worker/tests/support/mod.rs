//! A worker that serves, and everything that a test does with it.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::{net::SocketAddr, path::Path, sync::Arc};

use stator_agg::Agg;
use stator_common::{
    Card,
    card::Role,
    discovery::{Discovery, Watch, mem::Mem},
    drain::{self, Trigger},
    plane::{Client, ClientConfig},
    proto::worker::{self, Delta},
    telemetry::Telemetry,
};
use stator_decode::Decode;
use stator_prefill::Prefill;
use stator_sim::{Handle, Sim};
use stator_testkit::{
    client,
    http::{get, send, until},
    ports, vllm,
};
use stator_worker::{
    Config, Plan, Worker,
    cli::{DiscoveryBackend, EngineKind},
};
use tokio::task::JoinHandle;

/// The connector of an engine that hands KV on or fetches it.
const NIXL: &str = r#"--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_both"}"#;

pub(crate) fn code(delta: &Delta) -> worker::Code {
    delta.error.as_ref().expect("an error").code()
}

/// What the role of a worker does to requests.
fn plan(role: Role, config: &Config) -> Arc<dyn Plan> {
    let handoff = || {
        let handoff = config.handoff(role).expect("readable");
        handoff.expect("a connector")
    };
    match role {
        Role::Prefill => Arc::new(Prefill::new(handoff())),
        Role::Decode => Arc::new(Decode::new(handoff())),
        Role::Agg | Role::Encode => Arc::new(Agg),
    }
}

/// A worker that serves, and everything that a test does with it.
pub(crate) struct Cluster {
    pub(crate) address: String,
    system: SocketAddr,
    engine_port: u16,
    model: tempfile::TempDir,
    pub(crate) watch: Watch,
    pub(crate) trigger: Trigger,
    served: JoinHandle<anyhow::Result<()>>,
}

pub(crate) fn config(model: &Path, engine_port: u16) -> Config {
    Config {
        model: model.display().to_string(),
        served_model_name: vec!["m".to_owned(), "alias".to_owned()],
        discovery_backend: DiscoveryBackend::Mem,
        system_port: 0,
        engine: Some(EngineKind::Attach),
        engine_attach: Some(format!("tcp://127.0.0.1:{engine_port}")),
        run_dir: Some(model.join("run")),
        ..Config::default()
    }
}

pub(crate) fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let json = r#"{"vocab_size": 1000, "max_position_embeddings": 4096}"#;
    std::fs::write(folder.path().join("config.json"), json).expect("write");
    std::fs::write(folder.path().join("tokenizer.json"), "{}").expect("write");
    folder
}

impl Cluster {
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(Mem::default(), change).await
    }

    pub(crate) async fn start_in(
        discovery: impl Discovery,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        Self::start_as(Role::Agg, discovery, change).await
    }

    pub(crate) async fn start_as(
        role: Role,
        discovery: impl Discovery,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let model = model();
        let engine_port = ports::free_row(4);
        let mut config = config(model.path(), engine_port);
        change(&mut config);
        let watch = discovery.watch().await.expect("watch");
        let discovery = Arc::new(discovery);
        let plan = plan(role, &config);
        let worker = Worker::bind_in(config, role, plan, Telemetry::detached(), discovery)
            .await
            .expect("bind");
        let address = worker.address().to_string();
        let system = worker.system_addr().expect("system routes");
        let (trigger, drain) = drain::channel();
        Self {
            address,
            system,
            engine_port,
            model,
            watch,
            trigger,
            served: tokio::spawn(worker.serve(drain)),
        }
    }

    /// Starts a worker with an engine and connects to it.
    pub(crate) async fn serving(flags: &str) -> (Self, Handle, Card, Client) {
        let mut cluster = Self::start(|_| {}).await;
        let engine = cluster.engine(0, flags);
        let card = cluster.card().await;
        let client = cluster.client().await;
        (cluster, engine, card, client)
    }

    /// Starts a worker of a role that hands KV on or fetches it, with an engine.
    pub(crate) async fn handing(role: Role, flags: &str) -> (Self, Handle, Card, Client) {
        let mut cluster = Self::start_as(role, Mem::default(), |config| {
            config.engine_args = vec![NIXL.to_owned()];
        })
        .await;
        let engine = cluster.engine(0, &format!("{NIXL} {flags}"));
        let card = cluster.card().await;
        let client = cluster.client().await;
        (cluster, engine, card, client)
    }

    /// Starts an engine for a rank.
    pub(crate) fn engine(&self, rank: u16, flags: &str) -> Handle {
        let model = self.model.path().display().to_string();
        let args = ["serve".to_owned(), model]
            .into_iter()
            .chain(vllm::headless(self.engine_port + rank))
            .chain(flags.split_whitespace().map(str::to_owned));
        let configs = stator_sim::cli::parse(args)
            .expect("flags")
            .expect("no help");
        Sim::spawn(configs.into_iter().next().expect("one engine"))
    }

    pub(crate) async fn card(&mut self) -> Card {
        client::card(&mut self.watch).await
    }

    pub(crate) async fn client(&self) -> Client {
        let client = Client::connect(&self.address, ClientConfig::default());
        client.ready().await.expect("connect");
        client
    }

    /// Asks a system route; returns status and body.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let answered = send(self.system, get(path)).await;
        (answered.status, answered.text().to_owned())
    }

    /// Waits for the end of the worker, which must be a clean one.
    pub(crate) async fn ended(self) {
        self.served.await.expect("no panic").expect("a clean end");
    }

    /// Waits for the end of the worker, which must be an error.
    pub(crate) async fn failed(self) -> anyhow::Error {
        self.served.await.expect("no panic").expect_err("an error")
    }

    pub(crate) async fn until_requests(&self, count: usize) {
        let wanted = format!("\"requests\":{count},");
        until(self.system, "/status", |answered| {
            answered.text().contains(&wanted)
        })
        .await;
    }
}
