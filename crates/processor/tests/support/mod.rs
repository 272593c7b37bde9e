//! The processor under test, in this process and on port 0.

use std::net::SocketAddr;
use std::sync::Arc;

use stator_common::discovery::Discovery;
use stator_common::discovery::mem::Mem;
use stator_common::drain::{self, Trigger};
use stator_processor::Processor;
use stator_processor::config::Config;
use stator_testkit::http::until;
use tokio::task::JoinHandle;

/// A running processor.
pub(crate) struct Running<D = Mem> {
    pub(crate) addr: SocketAddr,
    pub(crate) system: Option<SocketAddr>,
    pub(crate) discovery: D,
    pub(crate) trigger: Trigger,
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
}

/// Starts a processor on a free port.
pub(crate) async fn start(config: Config) -> Running {
    start_in(config, &Mem::default()).await
}

/// Starts another one that finds the same workers.
pub(crate) async fn start_in<D: Discovery + Clone>(config: Config, discovery: &D) -> Running<D> {
    let discovery = discovery.clone();
    let processor = Processor::bind(Config {
        http_port: 0,
        ..config
    })
    .await
    .expect("the processor binds");
    let addr = processor.addr();
    let system = processor.system_addr();
    let (trigger, drain) = drain::channel();
    let task = tokio::spawn(processor.serve(Arc::new(discovery.clone()), drain));
    Running {
        addr,
        system,
        discovery,
        trigger,
        task,
    }
}

/// Waits until the models answer through `n` connected targets.
pub(crate) async fn until_open(addr: SocketAddr, n: usize) {
    until(addr, "/workers", |answered| {
        let body = answered.json();
        let targets = body["models"].as_array().into_iter().flatten();
        let targets = targets.flat_map(|model| model["targets"].as_array().into_iter().flatten());
        targets
            .filter(|target| target["availability"] == "open")
            .count()
            == n
    })
    .await;
}
