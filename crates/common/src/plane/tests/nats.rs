//! The frames over a real NATS server, which each test has for itself.

use std::sync::Arc;

use tokio::{runtime::Handle, task::block_in_place};

use crate::{
    nats::{Nats, subject},
    plane::{Server, ServerConfig, nats::Listener},
    settings::NatsSettings,
};

/// Returns a link as a process of its own has it.
///
/// - `port`: of the server.
pub(super) fn link(port: u16) -> Nats {
    let settings = NatsSettings {
        server: vec![format!("nats://127.0.0.1:{port}")],
        ..NatsSettings::default()
    };
    Nats::new(settings, "test")
}

/// Listens where another one did, or where nobody does.
pub(super) fn server(port: u16, address: &str, config: ServerConfig) -> Server {
    let subject = match address.strip_prefix("nats://") {
        Some(subject) => subject.to_owned(),
        None => subject::fresh("plane"),
    };
    let bound = async { Listener::bind(&link(port), subject).await.unwrap() };
    let listener = block_in_place(|| Handle::current().block_on(bound));
    Server::on(Arc::new(listener), config)
}
