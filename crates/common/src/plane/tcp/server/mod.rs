//! The worker's end of the tcp plane.
//!
//! One task per connection reads (`peer`); whoever has outputs writes them itself (`outlet`). While a
//! socket takes no more, deltas of one stream merge into one, so what waits is bounded by what the engine
//! can produce for the streams of that processor, and no other processor notices.

mod outlet;
mod peer;

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinSet, time};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    drain::Drain,
    plane::{
        net::Listen,
        server::{Handler, ServerConfig},
    },
};
use peer::Peer;

/// Accepts until it is told to stop; then lets what was sent reach the peers.
pub(in crate::plane) async fn serve(
    listener: Arc<dyn Listen>,
    config: ServerConfig,
    handler: Arc<impl Handler>,
    drain: Drain,
    stop: CancellationToken,
) {
    let config = Arc::new(config);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((io, peer)) => {
                let peer = Peer {
                    address: peer,
                    config: config.clone(),
                    drain: drain.clone(),
                    stop: stop.clone(),
                };
                connections.spawn(peer.run(io, handler.clone()));
            }
            Err(error) => {
                // Out of descriptors, or a peer that left in between: neither ends a server.
                warn!(%error, "accept a connection");
                time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}
