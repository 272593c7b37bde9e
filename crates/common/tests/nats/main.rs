//! Over real NATS servers, which are killed and started again meanwhile: pipes, requests, news, and who may log in.

#![allow(clippy::unwrap_used)]

mod events;
mod line;
mod login;
mod pipes;
mod raw;
mod requests;

use std::sync::atomic::{AtomicUsize, Ordering};

use stator_common::{nats::Nats, settings::NatsSettings};
use stator_testkit::nats::NatsServer;

/// Returns a link as a process of its own has it.
pub(crate) fn link(server: &NatsServer) -> Nats {
    Nats::new(settings(server), "test")
}

pub(crate) fn settings(server: &NatsServer) -> NatsSettings {
    NatsSettings {
        server: vec![server.url()],
        ..NatsSettings::default()
    }
}

/// Returns a name that no other test uses.
pub(crate) fn name() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("w-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
