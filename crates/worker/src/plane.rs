//! Where the worker takes requests: on which plane, bound to what, and what others are told.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Context;
use stator_common::{
    WorkerId,
    nats::Nats,
    plane::{
        Address, Server, ServerConfig,
        nats::{self, Listener},
    },
};

use crate::{
    cli::RequestPlane,
    config::{Config, ConfigError},
    network,
};

/// A request plane that is bound and does not serve yet.
pub(crate) struct Plane {
    pub(crate) server: Server,
    /// With the real port.
    pub(crate) bound: Address,
    /// As processors reach it.
    pub(crate) advertised: Address,
    /// What `--host` is.
    pub(crate) ip: IpAddr,
    /// The host under which others reach this machine.
    pub(crate) advertised_host: String,
}

impl Plane {
    /// Binds the listener.
    ///
    /// # Errors
    /// It cannot be bound, or may not be open to others; there is no NATS server.
    pub(crate) async fn bind(config: &Config, id: &WorkerId, nats: &Nats) -> anyhow::Result<Self> {
        let host = network::resolve(&config.host, config.port)
            .with_context(|| format!("resolve --host {}", config.host))?;
        let tls = &config.request_plane_tls;
        let is_guarded = config.plane_token.is_some() || tls.ca.is_some();
        let listens = config.request_plane != RequestPlane::Nats;
        if listens && !host.ip().is_loopback() && !is_guarded && !config.insecure_plane {
            return Err(ConfigError::OpenPlane(config.host.clone()).into());
        }
        let mut plane = ServerConfig::new(id.clone());
        plane.token = config
            .plane_token
            .as_ref()
            .map(|token| token.reveal().to_owned());
        plane.tls = (!tls.is_empty()).then(|| tls.files());
        let server = match config.request_plane {
            RequestPlane::Tcp => Server::bind(host, plane).context("open the request plane")?,
            RequestPlane::Http => {
                Server::bind_http(host, plane).context("open the request plane")?
            }
            RequestPlane::Nats => {
                let subject = nats::subject(&config.namespace, id);
                let listener = Listener::bind(nats, subject).await;
                let listener = listener.context("take requests over NATS")?;
                Server::on(Arc::new(listener), plane)
            }
        };
        let bound = server.address()?;
        let advertised_host = match &config.advertise_host {
            Some(host) => host.trim_matches(['[', ']']).to_owned(),
            None => network::advertised(host.ip())
                .context("find this machine's address; name it with --advertise-host")?
                .to_string(),
        };
        let advertised = match bound.place().parse::<SocketAddr>() {
            Ok(socket) => bound.at(network::join(&advertised_host, socket.port())),
            // Not a socket: the same place for everybody.
            Err(_) => bound.clone(),
        };
        Ok(Self {
            server,
            bound,
            advertised,
            ip: host.ip(),
            advertised_host,
        })
    }
}
