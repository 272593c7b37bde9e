//! The http request plane: a worker as a gRPC service, which anything that speaks gRPC can call.
//!
//! The rules are told in `proto/README.md`, the service is `proto/stator/worker/v1/service.proto`. In code: `status`
//! is how errors travel, `pipe` how byte streams of [`net`](super::net) get below HTTP/2, `server` the worker's end,
//! `client` the processor's. What a stream means is as on the tcp plane.
//!
//! A request is an HTTP/2 stream of its own here, so an engine step that touches hundreds of requests costs hundreds of small
//! writes where the tcp plane has one frame. It is for those who want gRPC on their network: its proxies, its
//! meshes, its clients.

pub(super) mod client;
mod pipe;
pub(super) mod server;
mod status;

use std::time::Duration;

/// Peers of another first number refuse each other; the second counts additions that may be skipped.
const VERSION: (u32, u32) = (1, 0);

/// Metadata: the version of this plane that the caller speaks, `MAJOR.MINOR`. Absent: a stranger, who is served.
const VERSION_KEY: &str = "stator-plane-version";

/// Metadata: the worker that the caller believes to be here. Absent: any.
const WORKER_KEY: &str = "stator-worker";

/// Metadata: the session that a request belongs to. Absent: none.
const SESSION_KEY: &str = "stator-session";

/// Metadata: the request's number within its session.
const STREAM_KEY: &str = "stator-stream";

/// Metadata of a status: our own `stator.worker.v1.Error`, encoded.
const ERROR_KEY: &str = "stator-error-bin";

/// Bytes of one HTTP/2 stream that may be on their way, unread: a request with a long prompt in one go.
const STREAM_WINDOW: u32 = 4 << 20;

/// The same of all streams of a connection. Both ends read whatever comes, so it only bounds what is in flight.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// The rest of the time after which a silent peer is dead, once it was asked.
fn answer_within(ping_every: Duration, dead_after: Duration) -> Duration {
    dead_after
        .saturating_sub(ping_every)
        .max(Duration::from_millis(100))
}
