//! Listens to other processors: one task each, which connects again when it has lost its own.

use std::collections::HashMap;
use std::time::Duration;

use prost::Message;
use stator_common::discovery::Peer;
use stator_common::events::plane::{self, Heard as Said, PlaneError};
use stator_common::nats::Nats;
use stator_common::proto::router::Bookings;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::TOPIC;

/// Pause before a connection is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// What comes from others.
pub(super) enum Heard {
    Said(Bookings),
    /// The connection is lost: what it said counts no longer.
    Lost(String),
}

impl Heard {
    /// Returns the name of the processor.
    pub(super) fn who(&self) -> &str {
        match self {
            Heard::Said(bookings) => &bookings.processor,
            Heard::Lost(name) => name,
        }
    }
}

/// Those that are listened to.
pub(super) struct Listeners {
    own: Peer,
    nats: Nats,
    hears: mpsc::Sender<Heard>,
    by_name: HashMap<String, AbortOnDropHandle<()>>,
}

impl Listeners {
    /// - `own`: who listens.
    /// - `nats`: the link to those that are reached by it.
    pub(super) fn new(own: Peer, nats: Nats, hears: mpsc::Sender<Heard>) -> Self {
        Self {
            own,
            nats,
            hears,
            by_name: HashMap::new(),
        }
    }

    /// Listens to those that are there, and returns the names of those that are not any more.
    pub(super) fn set(&mut self, there: Vec<Peer>) -> Vec<String> {
        let gone = self
            .by_name
            .extract_if(|name, _| !there.iter().any(|peer| peer.name == *name));
        let gone: Vec<_> = gone.map(|(name, _)| name).collect();
        for name in &gone {
            info!(processor = name, "another processor left");
        }
        for peer in there {
            if peer.name == self.own.name || self.by_name.contains_key(&peer.name) {
                continue;
            }
            info!(
                processor = peer.name,
                endpoint = peer.events.endpoint,
                "another processor is there"
            );
            if is_elsewhere(&peer, &self.own) {
                warn!(
                    processor = peer.name,
                    "it can be heard on its own machine, or in its own pod, only: --router-sync-host opens it to others"
                );
                // Known, so that it is said once.
                let nobody = tokio::spawn(std::future::pending());
                self.by_name
                    .insert(peer.name, AbortOnDropHandle::new(nobody));
                continue;
            }
            let name = peer.name.clone();
            let task = tokio::spawn(listen(peer, self.nats.clone(), self.hears.clone()));
            self.by_name.insert(name, AbortOnDropHandle::new(task));
        }
        gone
    }

    /// Says whether what was heard is of a processor that is still there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Says whether nobody is there.
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

/// Says whether a processor can be heard on its own network alone, and that is another one.
fn is_elsewhere(peer: &Peer, own: &Peer) -> bool {
    let endpoint = &peer.events.endpoint;
    let loopback = ["tcp://127.", "tcp://[::1]", "tcp://localhost:"];
    peer.host != own.host && loopback.iter().any(|start| endpoint.starts_with(start))
}

/// Listens to one processor, for ever.
async fn listen(peer: Peer, nats: Nats, hears: mpsc::Sender<Heard>) {
    loop {
        if let Err(error) = listen_once(&peer, &nats, &hears).await {
            debug!(processor = peer.name, %error, "another processor is not heard");
        }
        let lost = Heard::Lost(peer.name.clone());
        if hears.send(lost).await.is_err() {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn listen_once(
    peer: &Peer,
    nats: &Nats,
    hears: &mpsc::Sender<Heard>,
) -> Result<(), PlaneError> {
    let mut feed = plane::connect(nats, &peer.events, TOPIC).await?;
    loop {
        let Said::News(news) = feed.hear().await? else {
            continue;
        };
        match Bookings::decode(news) {
            // Whoever speaks there now may be another one at the same address.
            Ok(said) if said.processor == peer.name => {
                if hears.send(Heard::Said(said)).await.is_err() {
                    return Ok(());
                }
            }
            Ok(_) => {}
            Err(error) => warn!(processor = peer.name, %error, "not a message of stator.router.v1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use stator_common::card::Relay;

    use super::*;

    #[test]
    fn a_loopback_address_of_another_machine_is_not_dialled() {
        let peer = |host: &str, endpoint: &str| Peer {
            name: "a".to_owned(),
            host: host.to_owned(),
            events: Relay {
                endpoint: endpoint.to_owned(),
                snapshot_endpoint: endpoint.to_owned(),
            },
        };
        let own = peer("here", "tcp://127.0.0.1:1");
        assert!(!is_elsewhere(&peer("here", "tcp://127.0.0.1:2"), &own));
        assert!(is_elsewhere(&peer("there", "tcp://127.0.0.1:2"), &own));
        assert!(is_elsewhere(&peer("there", "tcp://[::1]:2"), &own));
        assert!(!is_elsewhere(&peer("there", "tcp://10.0.0.7:2"), &own));
    }
}
