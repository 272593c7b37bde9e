//! A worker: bound early, ready when its engines are, gone when it is told to drain.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context;
use parking_lot::Mutex;
use stator_common::{
    Code, WorkerId,
    card::Role,
    discovery::{self, Discovery},
    drain::Drain,
    nats::Nats,
    plane::Address,
    telemetry::Telemetry,
    tickets::LineName,
};
use stator_engine::{Lockstep, Phase, StartError, State};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    Plan,
    adapters::Adapter,
    announce::{self, Listeners},
    config::Config,
    handler::Serving,
    kv_events::KvEvents,
    launch::{self, RunDir},
    line::{InLine, Promises},
    metrics::WorkerMetrics,
    network,
    plane::Plane,
    preflight::{self, Finding, Subject},
    publication::Publication,
    rank::{self, Rank},
    requests::Count,
    status::{Health, Loads},
    system::System,
    transfer::Transfer,
};

/// A worker whose listeners are bound and whose engines do not run yet.
pub struct Worker {
    config: Config,
    role: Role,
    plan: Arc<dyn Plan>,
    id: WorkerId,
    plane: Plane,
    /// This machine's address, as others reach it.
    host: IpAddr,
    system: Option<System>,
    discovery: Arc<dyn Discovery>,
    ranks: Vec<stator_engine::Config>,
    run_dir: RunDir,
    adapters: Arc<[Adapter]>,
    transfer: Transfer,
    kv_events: KvEvents,
    nats: Nats,
    telemetry: Telemetry,
}

impl Worker {
    /// Binds the listeners, so that a taken port fails now and not after the engine has started.
    ///
    /// # Errors
    /// A listener cannot be bound or may not be open to others; the engines cannot be laid out.
    pub async fn bind(
        config: Config,
        role: Role,
        plan: Arc<dyn Plan>,
        telemetry: Telemetry,
    ) -> anyhow::Result<Self> {
        let discovery = discovery(&config).await?;
        // A model may load for minutes before the worker registers.
        let register = discovery.check_register().await;
        register.context("look whether the worker may register")?;
        Self::bind_in(config, role, plan, telemetry, discovery).await
    }

    /// Like [`Worker::bind`], in a given place of discovery.
    ///
    /// # Errors
    /// As [`Worker::bind`].
    pub async fn bind_in(
        config: Config,
        role: Role,
        plan: Arc<dyn Plan>,
        telemetry: Telemetry,
        discovery: Arc<dyn Discovery>,
    ) -> anyhow::Result<Self> {
        let id = WorkerId(format!("{role}-{:012x}", rand::random::<u64>() >> 16));
        let nats = Nats::new(config.nats.clone(), id.0.clone());
        let plane = Plane::bind(&config, &id, &nats).await?;
        let system = match u16::try_from(config.system_port) {
            Ok(port) => {
                let address = network::resolve(&config.system_host, port)
                    .with_context(|| format!("resolve --system-host {}", config.system_host))?;
                let system = System::bind(address).await;
                Some(system.with_context(|| format!("listen on {address}"))?)
            }
            // -1: none.
            Err(_) => None,
        };
        let host = network::advertised(plane.ip).context("find this machine's address")?;
        let mut engines = launch::engines(&config, role, &id, host)?;
        let mut kv_events = engines.kv_events;
        let relay = kv_events
            .start_relay(&config, &nats, &id, plane.ip, &plane.advertised_host)
            .await;
        relay.context("start the relay of KV events")?;
        if launch::steps_together(&config) {
            let lockstep = Lockstep::start(config.data_parallel_size).await;
            let lockstep = lockstep.context("start the coordinator of the ranks")?;
            for engine in &mut engines.configs {
                engine.lockstep = Some(lockstep.clone());
            }
        }
        Ok(Self {
            config,
            role,
            plan,
            id,
            plane,
            host,
            system,
            discovery,
            ranks: engines.configs,
            run_dir: engines.run_dir,
            adapters: engines.adapters.into(),
            transfer: engines.transfer,
            kv_events,
            nats,
            telemetry,
        })
    }

    /// Returns the bound address of the request plane.
    pub fn address(&self) -> &Address {
        &self.plane.bound
    }

    /// Returns the bound address of the system routes, where there are any.
    pub fn system_addr(&self) -> Option<SocketAddr> {
        self.system
            .as_ref()
            .and_then(|system| system.local_addr().ok())
    }

    /// Looks whether this worker could serve, before its engines are started.
    pub async fn preflight(&self) -> Vec<Finding> {
        let subject = Subject {
            config: &self.config,
            role: self.role,
            sides: &self.transfer.sides,
            event_ports: &self.kv_events.ports,
            unbound: false,
            host: self.host,
            discovery: &*self.discovery,
        };
        preflight::examine(&subject).await
    }

    /// Starts the engines and serves until `drain` says otherwise and nothing runs any more.
    ///
    /// # Errors
    /// An engine cannot be started, or the worker cannot make itself known.
    pub async fn serve(self, drain: Drain) -> anyhow::Result<()> {
        let stop = CancellationToken::new();
        // Whatever ends this, the engines end too.
        let _stop = stop.clone().drop_guard();
        announce::listeners(
            &self.config,
            &Listeners {
                plane: &self.plane,
                system: self.system_addr(),
                sides: &self.transfer.sides,
                relay: self.kv_events.relay_addr(),
                event_ports: &self.kv_events.ports,
                discovery: self.discovery.name(),
            },
        );
        let serving = Arc::new(self.serving());
        tokio::spawn({
            let (telemetry, stop) = (self.telemetry.clone(), stop.clone());
            async move { stop.run_until_cancelled(telemetry.upkeep()).await }
        });
        if let Some(system) = self.system {
            let (health, metrics) = (serving.health.clone(), serving.metrics.clone());
            system.spawn(health, metrics, self.telemetry, stop.clone());
        }
        let server = self.plane.server.spawn(serving.clone(), drain.clone());
        info!(
            worker = %self.id,
            model = self.config.model,
            engines = serving.ranks.len(),
            run_dir = %self.run_dir.path.display(),
            "starting the engine"
        );
        let mut engines = JoinSet::new();
        for rank in serving.ranks.clone() {
            let stop = stop.clone();
            engines.spawn(async move { rank.run(stop).await });
        }
        let advertised = self.plane.advertised.to_string();
        let publication = Publication {
            config: &self.config,
            role: self.role,
            transfer: &self.transfer,
            kv_events: &self.kv_events,
            id: &self.id,
            address: &advertised,
            discovery: &*self.discovery,
            serving: &serving,
        };
        let line = LineName::new(&self.config.namespace, &self.config.names()[0]);
        let in_line = InLine::new(&serving, &self.nats, &self.id, &self.plane.advertised, line)
            .filter(|_| self.role == Role::Prefill);
        let ended = tokio::select! {
            ended = publication.run() => ended,
            ended = first_failure(&mut engines) => Err(ended).context("keep the engine running"),
            () = serving.publish_load() => Ok(()),
            () = take_in_line(in_line) => Ok(()),
            () = drain.draining() => Ok(()),
        };
        serving.health.draining.store(true, Ordering::Release);
        if ended.is_ok() {
            finish(&serving, &drain).await;
        }
        server.close().await;
        stop.cancel();
        while engines.join_next().await.is_some() {}
        info!(worker = %self.id, "worker gone");
        ended
    }

    fn serving(&self) -> Serving {
        let names = self.config.names();
        let count = Arc::new(Count::default());
        let health = Arc::new(Health {
            worker: self.id.0.clone(),
            role: self.role.to_string(),
            models: names.clone(),
            loads: Arc::new(Loads::new(self.config.data_parallel_size)),
            engines: Mutex::new(vec![State::Starting(Phase::Preparing); self.ranks.len()]),
            draining: AtomicBool::new(false),
            requests: count.clone(),
        });
        let metrics = WorkerMetrics::new();
        let (changed, changes) = watch::channel(0);
        let ranks = (0..).zip(&self.ranks).map(|(index, config)| {
            Arc::new(Rank {
                index,
                config: config.clone(),
                model: names[0].clone(),
                plan: self.plan.clone(),
                health: health.clone(),
                metrics: metrics.clone(),
                active: Mutex::new(None),
                changed: changed.clone(),
            })
        });
        Serving {
            ranks: ranks.collect(),
            plan: self.plan.clone(),
            adapters: self.adapters.clone(),
            health: health.clone(),
            count,
            metrics: metrics.clone(),
            files: Mutex::default(),
            connections: Mutex::default(),
            changed: changes,
            promises: Promises::default(),
        }
    }
}

async fn discovery(config: &Config) -> anyhow::Result<Arc<dyn Discovery>> {
    let path = config.discovery_path.as_deref();
    let opened = discovery::open(
        config.discovery_backend,
        path,
        &config.etcd,
        &config.kubernetes,
    );
    opened.await.context("open the place of discovery")
}

/// Looks whether a worker could serve, and binds nothing for good.
///
/// # Errors
/// This machine's address is not known; the engines cannot be laid out.
pub(crate) async fn preflight(config: &Config, role: Role) -> anyhow::Result<Vec<Finding>> {
    let host = network::resolve(&config.host, config.port)
        .with_context(|| format!("resolve --host {}", config.host))?;
    let host = network::advertised(host.ip()).context("find this machine's address")?;
    let id = WorkerId(format!("{role}-preflight"));
    // A kept engine's folder is not touched.
    let laid_out = Config {
        engine_keep: false,
        ..config.clone()
    };
    let engines = launch::engines(&laid_out, role, &id, host)?;
    let discovery = discovery(config).await?;
    let subject = Subject {
        config,
        role,
        sides: &engines.transfer.sides,
        event_ports: &engines.kv_events.ports,
        unbound: true,
        host,
        discovery: &*discovery,
    };
    Ok(preflight::examine(&subject).await)
}

/// Takes prompts for as long as the worker serves.
async fn take_in_line(in_line: Option<InLine<'_>>) {
    match in_line {
        // Large, and there once.
        Some(in_line) => Box::pin(in_line.run()).await,
        None => std::future::pending().await,
    }
}

/// Waits for an engine that cannot be started at all.
async fn first_failure(engines: &mut JoinSet<Result<(), StartError>>) -> anyhow::Error {
    loop {
        match engines.join_next().await {
            Some(Ok(Err(error))) => return error.into(),
            Some(Err(panic)) => return panic.into(),
            // One that was told to stop.
            Some(Ok(Ok(()))) => {}
            None => std::future::pending().await,
        }
    }
}

/// Lets what runs finish, up to the deadline, and ends the rest so that it can go on elsewhere.
async fn finish(serving: &Serving, drain: &Drain) {
    info!(requests = serving.count.get(), "draining");
    let finished = async {
        serving.count.none().await;
        if serving.plan.outlives_cancel() {
            // What was handed on goes with the engine: those who were promised it come first.
            serving.health.loads.unused().await;
        }
    };
    tokio::select! {
        () = finished => return,
        () = drain.aborting() => {}
    }
    for active in serving.active() {
        let left = active.requests.take_all();
        warn!(requests = left.len(), "the worker ends before its requests");
        serving.metrics.failed(Code::Draining, left.len());
        rank::fail(left, Code::Draining, "the worker ended before the request");
    }
}
