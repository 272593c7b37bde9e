//! The system routes on a port of their own: for launchers, probes and scrapers, which have no keys.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use stator_common::drain::Phase;
use tokio::net::TcpListener;
use tracing::error;

use super::{BindError, health, listener, scrape, workers};
use crate::App;
use crate::config::Config;

/// A taken port for the system routes.
pub(super) struct System {
    socket: TcpListener,
    addr: SocketAddr,
}

impl System {
    /// Takes the configured port, if there is one.
    pub(super) async fn bind(config: &Config) -> Result<Option<Self>, BindError> {
        let Ok(port) = u16::try_from(config.system_port) else {
            return Ok(None);
        };
        let (socket, addr) = listener::bind(&config.system_host, port).await?;
        Ok(Some(Self { socket, addr }))
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves for ever: it still answers while the rest drains.
    pub(super) async fn serve(self, app: Arc<App>) {
        let router = Router::new()
            .route("/live", get(health::live))
            .route("/health", get(health::health))
            .route("/status", get(status))
            .route("/metrics", get(scrape::metrics))
            .route("/workers", get(workers::workers))
            .with_state(app);
        if let Err(error) = axum::serve(self.socket, router).await {
            error!(%error, "system routes ended");
        }
    }
}

/// Sums up how the process is, in the words that every role uses.
async fn status(State(app): State<Arc<App>>) -> Json<Value> {
    let models = app.models.list();
    let up: Vec<_> = models
        .iter()
        .filter(|model| model.fleet.is_available())
        .map(|model| &model.id)
        .collect();
    let state = match app.drain.phase() {
        Phase::Draining | Phase::Aborting => "draining",
        Phase::Running if up.is_empty() => "starting",
        Phase::Running => "ready",
    };
    let phase = (state == "starting").then(|| health::reasons(&app, &models).join("; "));
    let totals = app.metrics.totals();
    Json(json!({
        "state": state,
        "phase": phase,
        "models": up,
        "running": totals.inflight.load(Ordering::Relaxed),
        "generated_tokens": totals.output_tokens.load(Ordering::Relaxed),
    }))
}
