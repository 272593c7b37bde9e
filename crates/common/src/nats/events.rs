//! What the library tells of a connection: when a life ends, and what a person should know.

use std::sync::Arc;

use async_nats::{ConnectOptions, Event};
use parking_lot::Mutex;
use tracing::{debug, info, warn};

use super::Life;

/// The lives of a connection, of which there is always one.
#[derive(Default)]
pub(super) struct Lives(Mutex<Life>);

impl Lives {
    /// Returns the life that lasts until the connection is lost the next time.
    pub(super) fn present(&self) -> Life {
        self.0.lock().clone()
    }

    fn end(&self) {
        let ended = std::mem::take(&mut *self.0.lock());
        ended.cancel();
    }
}

/// Has the library tell.
///
/// It tells through a queue that may overflow. What keeps count of messages finds a life that ended unsaid by the hole.
pub(super) fn told(
    options: ConnectOptions,
    lives: &Arc<Lives>,
    servers: &Arc<str>,
) -> ConnectOptions {
    let (lives, servers) = (lives.clone(), servers.clone());
    options.event_callback(move |event| {
        match event {
            Event::Disconnected => {
                warn!(%servers, "the connection to NATS is lost; trying to get it back");
                lives.end();
            }
            Event::Connected => {
                debug!(%servers, "a connection to NATS");
            }
            Event::LameDuckMode => {
                info!(%servers, "the NATS server is about to stop");
            }
            Event::SlowConsumer(subscription) => {
                warn!(
                    subscription,
                    "messages of NATS were dropped: they came faster than they were taken"
                );
            }
            Event::ServerError(error) => {
                warn!(%servers, %error, "the NATS server refuses something");
            }
            Event::ClientError(error) => debug!(%servers, %error, "no connection to NATS yet"),
            Event::Draining | Event::Closed => {}
        }
        std::future::ready(())
    })
}
