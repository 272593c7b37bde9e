//! The HTTP side: from a socket to a handler and back.
//!
//! `listener` accepts connections, `connection` runs each under its time-outs, `tls` wraps it, `front`
//! does what every request needs (id, key, count), `routes` says which handler answers. What the
//! generating routes do is not here but in [`crate::openai`].

mod auth;
mod body;
mod connection;
mod front;
mod health;
mod listener;
mod models;
mod openapi;
mod posture;
mod routes;
mod scrape;
mod system;
mod tls;
mod workers;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use futures::future::OptionFuture;
use stator_common::discovery::{self, Discovery, OpenError};
use stator_common::drain::Drain;
use stator_common::nats::Nats;
use tracing::info;

use crate::App;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::models::{Models, Registry};
use crate::peers::{Peers, SyncError};

pub(crate) use auth::Keys;
pub(crate) use routes::HttpCounters;

pub use body::RequestBody;
pub use front::RequestId;
pub use stator_common::tls::TlsError;

/// Why the processor could not take its place.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The name of the host means no address.
    #[error("resolve {host}")]
    Resolve {
        /// As configured.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Other processors cannot be told what this one books.
    #[error(transparent)]
    Sync(#[from] SyncError),
}

/// Opens the configured discovery.
///
/// # Errors
/// [`OpenError`].
pub async fn discovery(config: &Config) -> Result<Arc<dyn Discovery>, OpenError> {
    let path = config.discovery_path.as_deref();
    let discovery = discovery::open(
        config.discovery_backend,
        path,
        &config.etcd,
        &config.kubernetes,
    );
    let discovery = discovery.await?;
    info!(place = discovery.name(), "looking for workers");
    Ok(discovery)
}

/// A processor whose port is taken and that serves nobody yet.
pub struct Processor {
    config: Arc<Config>,
    listener: listener::Listener,
    system: Option<system::System>,
    peers: Option<Peers>,
    /// How workers are known that speak TLS.
    plane_tls: Option<Arc<stator_common::tls::Client>>,
    /// The link to what is reached by a NATS server.
    nats: Nats,
}

impl Processor {
    /// Takes the port and reads certificate and key, so that mistakes show at once.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        listener::raise_file_limit();
        let listener = listener::Listener::bind(&config).await?;
        let system = system::System::bind(&config).await?;
        let nats = Nats::new(config.nats.clone(), "stator-processor");
        let peers = Peers::bind(&config, &nats).await?;
        let plane_tls = plane_tls(&config)?;
        Ok(Self {
            plane_tls,
            nats,
            config: Arc::new(config),
            listener,
            system,
            peers,
        })
    }

    /// Returns the address that clients connect to, with the real port.
    pub fn addr(&self) -> SocketAddr {
        self.listener.addr()
    }

    /// Returns the address of the system routes, where they are served.
    pub fn system_addr(&self) -> Option<SocketAddr> {
        self.system.as_ref().map(system::System::addr)
    }

    /// Serves until drained: finishes what runs after *draining*, cuts it off at *aborting*.
    ///
    /// # Errors
    /// When discovery cannot be watched.
    pub async fn serve(self, discovery: Arc<dyn Discovery>, drain: Drain) -> anyhow::Result<()> {
        let models = Arc::new(Models::default());
        let metrics = Arc::new(Metrics::new());
        let registry = Registry::new(
            Arc::clone(&models),
            Arc::clone(&metrics),
            Arc::clone(&self.config),
            self.plane_tls.clone(),
            self.nats,
        );
        let plane_tls = async move {
            match self.plane_tls {
                Some(tls) => tls.watch().await,
                None => std::future::pending().await,
            }
        };
        let app = Arc::new(App::new(self.config, models, metrics, drain.clone()));
        let workers = discovery.watch().await.context("watch discovery")?;
        posture::announce(
            &app.config,
            self.listener.addr(),
            self.system.as_ref().map(|system| system.addr()),
        );
        let router = routes::router(Arc::clone(&app));
        let system = self.system.map(|system| system.serve(Arc::clone(&app)));
        let peers = self.peers.map(|peers| {
            let models = Arc::clone(&app.models);
            peers.run(discovery, models, Arc::clone(&app.peers))
        });
        tokio::select! {
            () = self.listener.serve(Arc::clone(&app), router, drain) => {}
            () = registry.run(workers) => {}
            () = plane_tls => {}
            () = app.metrics.upkeep() => {}
            Some(()) = OptionFuture::from(system) => {}
            Some(()) = OptionFuture::from(peers) => {}
        }
        Ok(())
    }
}

fn plane_tls(config: &Config) -> Result<Option<Arc<stator_common::tls::Client>>, TlsError> {
    if config.request_plane_tls.is_empty() {
        return Ok(None);
    }
    let name = config.request_plane_tls_name.as_deref();
    let tls = stator_common::tls::Client::load(config.request_plane_tls.files(), name)?;
    Ok(Some(Arc::new(tls)))
}
