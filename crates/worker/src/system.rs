//! The system routes: how the worker is, for people, launchers and orchestrators. They change nothing.

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use stator_common::telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::{self, WorkerMetrics},
    status::Health,
};

/// A bound listener for the system routes.
pub(crate) struct System {
    listener: TcpListener,
}

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    metrics: WorkerMetrics,
    telemetry: Telemetry,
}

impl System {
    /// Binds.
    ///
    /// # Errors
    /// Those of the operating system.
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
        })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`.
    pub(crate) fn spawn(
        self,
        health: Arc<Health>,
        metrics: WorkerMetrics,
        telemetry: Telemetry,
        stop: CancellationToken,
    ) {
        let router = Router::new()
            .route("/live", get(|| async { "live\n" }))
            .route("/health", get(health_route))
            .route("/status", get(status_route))
            .route("/metrics", get(metrics_route))
            .with_state(Shared {
                health,
                metrics,
                telemetry,
            });
        tokio::spawn(async move {
            let serve =
                axum::serve(self.listener, router).with_graceful_shutdown(stop.cancelled_owned());
            // It only ends when it is told to.
            let _ = serve.await;
        });
    }
}

/// 200 while requests are taken, else 503; the status either way.
async fn health_route(State(shared): State<Shared>) -> impl IntoResponse {
    let status = if shared.health.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(shared.health.status()))
}

async fn status_route(State(shared): State<Shared>) -> impl IntoResponse {
    Json(shared.health.status())
}

async fn metrics_route(State(shared): State<Shared>) -> impl IntoResponse {
    shared
        .metrics
        .running
        .set(shared.health.requests.get() as f64);
    let model = shared.health.models.first().map_or("", String::as_str);
    metrics::set_loads(model, &shared.health.loads.ranks());
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4")],
        shared.telemetry.render(),
    )
}
