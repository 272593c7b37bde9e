//! One line at start-up that says what is open to whom.

use std::net::SocketAddr;

use stator_common::plane::Address;
use tracing::{info, warn};

use crate::{
    cli::DiscoveryBackend,
    config::Config,
    launch,
    network::{self, reach},
    plane::Plane,
    transfer::Side,
};

/// What a worker listens on.
pub(crate) struct Listeners<'a> {
    pub(crate) plane: &'a Plane,
    pub(crate) system: Option<SocketAddr>,
    pub(crate) sides: &'a [Side],
    /// Where this worker tells what its engines cache.
    pub(crate) relay: Option<SocketAddr>,
    /// Ports that the engines tell it on.
    pub(crate) event_ports: &'a [u16],
    pub(crate) discovery: String,
}

/// Says what is open to whom, and how to close it.
pub(crate) fn listeners(config: &Config, listeners: &Listeners<'_>) {
    let plane = listeners.plane;
    let tls = &config.request_plane_tls;
    let asked = match (&config.plane_token, &tls.ca) {
        (Some(_), Some(_)) => "with the plane's token and a certificate",
        (Some(_), None) => "with the plane's token",
        (None, Some(_)) => "with a certificate",
        (None, None) => "without a token",
    };
    let over_nats = matches!(plane.bound, Address::Nats(_));
    let is_encrypted = if over_nats {
        config.nats.is_encrypted()
    } else {
        !tls.is_empty()
    };
    let encrypted = if is_encrypted {
        "encrypted"
    } else {
        "not encrypted"
    };
    let whom = if over_nats {
        "whom the NATS server lets in"
    } else {
        reach(plane.ip)
    };
    let system = match listeners.system {
        Some(address) => format!(
            "status and metrics on http://{address} for {}, read only",
            reach(address.ip())
        ),
        None => "no status routes (--system-port)".to_owned(),
    };
    let attach = config.engine_attach.as_deref().and_then(attach_address);
    let engine = match attach {
        Some(address) => format!(
            "; engines may dial in on tcp://{address} and then on two free ports, for {}",
            reach(address.ip())
        ),
        None => String::new(),
    };
    let sides: Vec<String> = listeners
        .sides
        .iter()
        .map(|side| {
            let place = network::join(&side.host, side.port);
            let reached = network::resolve(&side.host, side.port)
                .map_or("whoever knows that name", |address| reach(address.ip()));
            format!(
                "; other engines on tcp://{place} for {reached}, without a secret (vLLM has none)"
            )
        })
        .collect();
    let sides = sides.concat();
    let relay = match listeners.relay {
        Some(address) => format!(
            "; names of cached blocks on tcp://{address} and the port of their questions, for {}",
            reach(address.ip())
        ),
        None => String::new(),
    };
    let events = match listeners.event_ports {
        [first, .., last] => format!(
            "; what engines cache, tokens included, on tcp ports {first} to {last} for {}, without a secret (vLLM has none)",
            if plane.ip.is_loopback() {
                "this machine only"
            } else {
                "the network"
            }
        ),
        _ => String::new(),
    };
    info!(
        "open: requests on {} (told to others as {}) for {whom}, {asked}, {encrypted}{engine}{sides}{relay}{events}; {system}; \
         discovery: {}",
        plane.bound, plane.advertised, listeners.discovery,
    );
    let guarded = config.plane_token.is_some() || tls.ca.is_some();
    if !over_nats && !plane.ip.is_loopback() && !guarded {
        warn!(
            "whoever reaches {} can use the engine; close it with --plane-token-file or --host 127.0.0.1",
            plane.bound
        );
    }
    if let Some(address) = attach.filter(|address| !address.ip().is_loopback()) {
        warn!(
            "whoever reaches tcp://{address} or those two ports can pose as the engine; \
             close it with --engine-attach tcp://127.0.0.1:{}, or let only engines into its network",
            address.port()
        );
    }
    if config.discovery_backend == DiscoveryBackend::Mem {
        warn!("discovery is in this process's memory: no other process will find this worker");
    }
}

/// Returns where attached engines dial in. One that is no address is complained about elsewhere.
fn attach_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = launch::address(text).ok()?;
    network::resolve(&host, port).ok()
}
