//! Data-parallel ranks that step together, as those of a mixture-of-experts model do.
//!
//! The experts are spread over all ranks, so no rank can step alone: while any has requests, the others run empty
//! steps beside it. Such a stretch is a *wave*. Ranks that are idle sleep, and are woken for the next wave by a
//! coordinator, which vLLM's front end runs as a process (`v1/engine/coordinator.py`, 0.23 to 0.33) and which is a
//! task here. Everything else about a rank is as with any other engine; it is told of the others in its handshake.
//!
//! What it does not do: balance. Which rank takes a request is the router's business, as with dense ranks.
//! A rank that dies takes the others with it: they wait for it in a collective operation.

mod coordinator;
mod notice;

use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use zeromq::ZmqError;

use crate::schema::{Schema, SchemaError};
use coordinator::Coordinator;
pub(crate) use notice::Layout;

/// Ports that the ranks' process groups may need beside the first (vLLM takes five).
const FURTHER_PORTS: usize = 5;

/// What the ranks of one model have in common. Cheap to clone; the coordinator ends with the last clone.
#[derive(Clone, Debug)]
pub struct Lockstep(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ranks: u32,
    addresses: Addresses,
    shared: Arc<Shared>,
    requests: mpsc::UnboundedSender<u32>,
    _stop: DropGuard,
}

/// What a rank is told of the others, in its handshake.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    /// Where ranks hear of waves.
    pub(crate) input: String,
    /// Where ranks tell of them.
    pub(crate) output: String,
    /// Where their process group meets.
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) further_ports: Vec<u16>,
}

/// What the coordinator knows, for those who send requests.
#[derive(Debug, Default)]
struct Shared {
    wave: AtomicU32,
    /// Whether the ranks step, as far as is known here.
    running: AtomicBool,
    /// How ranks write what they tell; set by the first one that is ready.
    layout: std::sync::OnceLock<Layout>,
}

impl Lockstep {
    /// Starts the coordinator of `ranks` ranks on this machine.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(ranks: u32) -> Result<Self, ZmqError> {
        let host = "127.0.0.1";
        let shared = Arc::new(Shared::default());
        let (requests, requested) = mpsc::unbounded_channel();
        let coordinator = Coordinator::bind(host, ranks, Arc::clone(&shared)).await?;
        let ports = free_ports(host, 1 + FURTHER_PORTS)?;
        let addresses = Addresses {
            input: coordinator.input.clone(),
            output: coordinator.output.clone(),
            host: host.to_owned(),
            port: ports[0],
            further_ports: ports[1..].to_vec(),
        };
        let stop = CancellationToken::new();
        tokio::spawn({
            let stop = stop.clone();
            async move { stop.run_until_cancelled(coordinator.run(requested)).await }
        });
        Ok(Self(Arc::new(Inner {
            ranks,
            addresses,
            shared,
            requests,
            _stop: stop.drop_guard(),
        })))
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> u32 {
        self.0.ranks
    }

    pub(crate) fn addresses(&self) -> &Addresses {
        &self.0.addresses
    }

    /// Returns the part of a rank that is ready.
    ///
    /// - `schema`: how it writes; all ranks are the same build.
    pub(crate) fn rank(&self, number: u32, schema: &Schema) -> Result<Rank, SchemaError> {
        let _ = self.0.shared.layout.set(Layout::new(schema)?);
        Ok(Rank {
            all: self.clone(),
            number,
        })
    }
}

/// One of the ranks.
#[derive(Clone, Debug)]
pub(crate) struct Rank {
    all: Lockstep,
    number: u32,
}

impl Rank {
    /// Returns the wave that a request belongs to that is sent now.
    pub(crate) fn wave(&self) -> u32 {
        self.all.0.shared.wave.load(Ordering::Acquire)
    }

    /// Notes that this rank was sent a request: if all sleep, the others are woken.
    pub(crate) fn requested(&self) {
        let inner = &self.all.0;
        if !inner.shared.running.swap(true, Ordering::AcqRel) {
            // The coordinator lives as long as this.
            let _ = inner.requests.send(self.number);
        }
    }
}

/// Returns ports that were free a moment ago, all different.
fn free_ports(host: &str, count: usize) -> std::io::Result<Vec<u16>> {
    let held = (0..count)
        .map(|_| TcpListener::bind((host, 0)))
        .collect::<std::io::Result<Vec<_>>>()?;
    held.iter()
        .map(|listener| Ok(listener.local_addr()?.port()))
        .collect()
}
