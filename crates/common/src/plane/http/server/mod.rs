//! The worker's end of the http plane: a gRPC server with health and reflection beside the service itself.

mod calls;
mod service;
mod session;
mod tokenless;

use std::{io, sync::Arc, time::Duration};

use futures::Stream;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tonic::{Request, service::interceptor::InterceptedService, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{error, warn};

use super::{CONNECTION_WINDOW, STREAM_WINDOW, answer_within, pipe::Pipe};
use crate::{
    drain::Drain,
    plane::{
        PING_EVERY,
        net::Listen,
        server::{Handler, ServerConfig},
    },
    proto::{DESCRIPTORS, worker::worker_server::WorkerServer},
};
use service::{Service, Shared};
use session::Session;
use tokenless::Tokenless;

/// What a closing server gives its peers to take what was written.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// A peer that says nothing within this time speaks no HTTP/2. As on the tcp plane.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// How often it is looked whether the worker is ready.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Requests of one connection: as many as an engine may be given. HTTP/2's own default is 100 to 250.
const MAX_STREAMS: u32 = 1 << 20;

/// Requests that may be cancelled before they were looked at: a processor that loses all its clients at once
/// is no attack.
const MAX_RESET: usize = 1 << 16;

/// Accepts until it is told to stop; then lets what was sent reach the peers.
pub(in crate::plane) async fn serve(
    listener: Arc<dyn Listen>,
    config: ServerConfig,
    handler: Arc<dyn Handler>,
    drain: Drain,
    stop: CancellationToken,
) {
    let cut = CancellationToken::new();
    let _cut = cut.clone().drop_guard();
    let (max_frame, dead_after) = (config.max_frame, config.dead_after);
    let asked = handler.clone();
    let shared = Arc::new(Shared {
        config,
        handler,
        drain: drain.clone(),
        stop: stop.clone(),
        sessions: parking_lot::Mutex::default(),
        strangers: parking_lot::Mutex::default(),
    });
    let worker = WorkerServer::new(Service(shared.clone()))
        .max_decoding_message_size(max_frame)
        .max_encoding_message_size(max_frame);
    let door = shared.clone();
    let worker = InterceptedService::new(worker, move |request: Request<()>| {
        door.admit(request.metadata()).map(|()| request)
    });
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut ready = asked.is_ready();
    tell(&reporter, ready).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("descriptors that were compiled with this program");
    // What strangers send is kept until it is whole.
    let health = health.max_decoding_message_size(tokenless::LONGEST_QUESTION);
    let reflection = reflection.max_decoding_message_size(tokenless::LONGEST_QUESTION);
    let streams = tokenless::streams();
    let stopped = {
        let stop = stop.clone();
        async move {
            stop.cancelled().await;
            shared.end_all();
        }
    };
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESET))
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(answer_within(PING_EVERY, dead_after)))
        .add_service(worker)
        .add_service(Tokenless::new(health, &streams))
        .add_service(Tokenless::new(reflection, &streams))
        .serve_with_incoming_shutdown(incoming(listener, cut.clone()), stopped);
    let tell_health = async {
        let mut look = time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                biased;
                () = drain.draining() => break,
                _ = look.tick() => {}
            }
            let now = asked.is_ready();
            if std::mem::replace(&mut ready, now) != now {
                tell(&reporter, now).await;
            }
        }
        tell(&reporter, false).await;
        std::future::pending::<()>().await;
    };
    let too_late = async {
        stop.cancelled().await;
        time::sleep(FLUSH_WITHIN).await;
    };
    tokio::select! {
        ended = server => if let Err(error) = ended {
            error!(%error, "the gRPC server ended");
        },
        () = tell_health => {}
        () = too_late => {}
    }
}

/// Tells who asks for health whether requests are served.
async fn tell(reporter: &HealthReporter, ready: bool) {
    let status = if ready {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in ["", "stator.worker.v1.Worker"] {
        reporter.set_service_status(service, status).await;
    }
}

fn incoming(
    listener: Arc<dyn Listen>,
    cut: CancellationToken,
) -> impl Stream<Item = io::Result<Pipe>> {
    futures::stream::unfold((listener, cut), |(listener, cut)| async move {
        loop {
            match listener.accept().await {
                Ok((io, peer)) => {
                    let pipe = Pipe::new(io, peer, cut.clone()).or_silent(HELLO_WITHIN);
                    return Some((Ok(pipe), (listener, cut)));
                }
                Err(error) => {
                    // Out of descriptors, or a peer that left in between: neither ends a server.
                    warn!(%error, "accept a connection");
                    time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    })
}
