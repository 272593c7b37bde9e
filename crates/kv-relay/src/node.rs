//! The relay of a machine: finds its workers in discovery and listens to their engines.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context;
use stator_common::{
    Card, WorkerId,
    discovery::{Discovery, Event},
    drain::Drain,
    events::ViewId,
    process,
    telemetry::Telemetry,
};
use stator_engine::kv_events::Endpoints;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{Relay, config::Config, system::System};

/// A relay whose ports are bound.
pub struct Node {
    relay: Relay,
    system: Option<System>,
    discovery: Arc<dyn Discovery>,
    /// This machine, as cards name it.
    host: String,
}

impl Node {
    /// Binds all ports, so that a taken one fails now.
    ///
    /// # Errors
    /// A port cannot be bound.
    pub async fn bind(config: &Config, discovery: Arc<dyn Discovery>) -> anyhow::Result<Self> {
        let relay = Relay::bind(config.place()).await?;
        let system = match u16::try_from(config.system_port) {
            Ok(port) => {
                let address = SocketAddr::new(config.system_host, port);
                let system = System::bind(address).await;
                Some(system.with_context(|| format!("listen on {address}"))?)
            }
            // -1: none.
            Err(_) => None,
        };
        Ok(Self {
            relay,
            system,
            discovery,
            host: process::machine(),
        })
    }

    /// Returns the relay.
    pub fn relay(&self) -> &Relay {
        &self.relay
    }

    /// Listens to the engines of this machine until the drain: nothing here has to be finished.
    ///
    /// # Errors
    /// Discovery cannot be read, or has ended.
    pub async fn serve(self, telemetry: Telemetry, drain: Drain) -> anyhow::Result<()> {
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        if let Some(system) = self.system {
            system.spawn(telemetry, stop);
        }
        let mut watch = self.discovery.watch().await.context("look for workers")?;
        loop {
            let event = tokio::select! {
                event = watch.next() => event.context("discovery has ended")?,
                () = drain.draining() => return Ok(()),
            };
            match event {
                Event::Put(card) => keep(&self.relay, &self.host, &card),
                Event::Gone(worker) => forget(&self.relay, &worker),
            }
        }
    }
}

/// Keeps views of a worker's engines that run on this machine.
fn keep(relay: &Relay, host: &str, card: &Card) {
    let engines = card
        .kv_events
        .as_ref()
        .map_or(&[][..], |events| &events.engines);
    let here = || engines.iter().filter(|engine| engine.host == host);
    relay.retain(&card.worker, |rank| {
        here().any(|engine| engine.dp_rank == rank)
    });
    for engine in here() {
        let view = ViewId {
            worker: card.worker.clone(),
            dp_rank: engine.dp_rank,
        };
        relay.keep(
            view,
            Endpoints {
                events: engine.endpoint.clone(),
                replay: engine.replay_endpoint.clone(),
                topic: engine.topic.clone(),
            },
        );
    }
}

fn forget(relay: &Relay, worker: &WorkerId) {
    info!(%worker, "worker gone");
    relay.forget(worker);
}
