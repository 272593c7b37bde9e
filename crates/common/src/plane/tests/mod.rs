//! What holds on every request plane: both ends in one process, over real sockets.
//!
//! A fact is written once, for any [`Plane`]; `on_every_plane` makes a test of it for each.

mod peers;
mod slow;
mod streams;

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{
    Client, ClientConfig, Connection, DeltaStream, Handler, PlaneError, Server, ServerConfig,
    ServerHandle, State, delta,
};
use crate::{
    BlobHash, Code, WorkerId,
    drain::{self, Trigger},
    proto::worker::{Delta, FinishReason, GenerateRequest, Leg, Load},
};

/// Makes a test per plane of each fact: an `async fn(Plane)` beside the call.
macro_rules! on_every_plane {
    ($($fact:ident),* $(,)?) => {
        on_every_plane!(@plane tcp, Tcp, $($fact),*);
        on_every_plane!(@plane http, Http, $($fact),*);
    };
    (@plane $name:ident, $plane:ident, $($fact:ident),*) => {
        mod $name {
            $(#[tokio::test]
            async fn $fact() {
                super::$fact(super::Plane::$plane).await;
            })*
        }
    };
}
use on_every_plane;

/// A request plane, as a worker is told to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Tcp,
    Http,
}

impl Plane {
    pub(super) fn worker(self, change: impl FnOnce(&mut ServerConfig)) -> Worker {
        self.worker_at("127.0.0.1:0", change)
    }

    /// Starts a worker at the address that another one had.
    pub(super) fn worker_at(self, address: &str, change: impl FnOnce(&mut ServerConfig)) -> Worker {
        let mut config = ServerConfig::new(WorkerId("w".to_owned()));
        change(&mut config);
        let place = address.rsplit_once('/').map_or(address, |(_, place)| place);
        let place = place.parse().unwrap();
        let server = match self {
            Self::Tcp => Server::bind(place, config),
            Self::Http => Server::bind_http(place, config),
        };
        let server = server.unwrap();
        let address = server.address().unwrap().to_string();
        let (sender, seen) = mpsc::unbounded_channel();
        let probe = Arc::new(Probe {
            seen: sender,
            blobs: Mutex::default(),
        });
        let (trigger, drain) = drain::channel();
        let handle = server.spawn(probe.clone(), drain);
        Worker {
            plane: self,
            address,
            seen,
            probe,
            trigger,
            handle,
        }
    }

    /// How a processor connects that is trusted here.
    pub(super) fn client_config(self) -> ClientConfig {
        ClientConfig::default()
    }
}

/// What a test's worker saw.
pub(super) enum Seen {
    Submit(Arc<Connection>, u32, Box<GenerateRequest>),
    Cancel(u32),
    Closed,
}

struct Probe {
    seen: mpsc::UnboundedSender<Seen>,
    blobs: Mutex<HashMap<BlobHash, Bytes>>,
}

impl Handler for Probe {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        let _ = self
            .seen
            .send(Seen::Submit(connection.clone(), stream, Box::new(request)));
    }

    fn cancel(&self, _: &Arc<Connection>, stream: u32) {
        let _ = self.seen.send(Seen::Cancel(stream));
    }

    fn closed(&self, _: &Arc<Connection>) {
        let _ = self.seen.send(Seen::Closed);
    }

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        self.blobs.lock().get(hash).cloned()
    }
}

pub(super) struct Worker {
    plane: Plane,
    pub(super) address: String,
    pub(super) seen: mpsc::UnboundedReceiver<Seen>,
    probe: Arc<Probe>,
    trigger: Trigger,
    handle: ServerHandle,
}

impl Worker {
    async fn client(&self) -> Client {
        let client = Client::connect(&self.address, self.plane.client_config());
        client.ready().await.unwrap();
        client
    }

    pub(super) async fn submitted(&mut self) -> (Arc<Connection>, u32, GenerateRequest) {
        match self.seen.recv().await {
            Some(Seen::Submit(connection, stream, request)) => (connection, stream, *request),
            _ => panic!("expected a submit"),
        }
    }
}

pub(super) fn request(id: &str) -> GenerateRequest {
    GenerateRequest {
        request_id: id.to_owned(),
        prompt_tokens: Bytes::from_static(&[1, 0, 0, 0]),
        ..GenerateRequest::default()
    }
}

pub(super) fn tokens(stream: u32, tokens: impl Into<Vec<u32>>) -> Delta {
    Delta {
        stream,
        tokens: tokens.into(),
        ..Delta::default()
    }
}

pub(super) fn last(stream: u32, finish: FinishReason) -> Delta {
    Delta {
        stream,
        finish: finish.into(),
        ..Delta::default()
    }
}

async fn read_to_end(stream: &mut DeltaStream) -> Delta {
    let mut all = Delta::default();
    while let Some(delta) = stream.next().await {
        delta::merge(&mut all, delta);
    }
    all
}
