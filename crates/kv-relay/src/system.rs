//! The system routes of a relay: alive, and what it counts. They change nothing.

use std::{io, net::SocketAddr};

use axum::{
    Router, extract::State, http::header::CONTENT_TYPE, response::IntoResponse, routing::get,
};
use stator_common::telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A bound listener.
pub(crate) struct System(TcpListener);

impl System {
    /// # Errors
    /// Those of the operating system.
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self)
    }

    /// Serves until `stop`.
    pub(crate) fn spawn(self, telemetry: Telemetry, stop: CancellationToken) {
        let router = Router::new()
            .route("/live", get(|| async { "live\n" }))
            .route("/health", get(|| async { "ok\n" }))
            .route("/metrics", get(metrics))
            .with_state(telemetry);
        tokio::spawn(async move {
            let serve = axum::serve(self.0, router).with_graceful_shutdown(stop.cancelled_owned());
            // It only ends when it is told to.
            let _ = serve.await;
        });
    }
}

async fn metrics(State(telemetry): State<Telemetry>) -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4")],
        telemetry.render(),
    )
}
