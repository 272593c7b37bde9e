//! What holds on every request plane: both ends in one process, over real sockets.
//!
//! A fact is written once, for any [`Plane`]; `on_every_plane` makes a test of it for each.

mod certificates;
mod grpc;
mod nats;
mod peers;
mod slow;
mod streams;
mod tls;

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use certificates::{TRUSTED, files};

use super::{
    Client, ClientConfig, Connection, DeltaStream, Handler, PlaneError, Server, ServerConfig,
    ServerHandle, State, delta,
};
use crate::{
    BlobHash, Code, WorkerId,
    drain::{self, Trigger},
    nats::Nats,
    proto::worker::{Delta, FinishReason, GenerateRequest, Leg, Load},
};

/// Makes a test per plane of each fact: an `async fn(Plane)` beside the call.
macro_rules! on_every_plane {
    ($($fact:ident),* $(,)?) => {
        on_every_plane!(@plane tcp, Tcp, $($fact),*);
        on_every_plane!(@plane http, Http, $($fact),*);
        on_every_tls_plane!($($fact),*);
        mod nats {
            // Another thread, since listening there waits for the server.
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
            async fn $fact() {
                if let Some(server) = stator_testkit::nats::NatsServer::start().await {
                    super::$fact(super::Plane::Nats(server.port())).await;
                }
            })*
        }
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

/// The same for the planes with certificates on both sides.
macro_rules! on_every_tls_plane {
    ($($fact:ident),* $(,)?) => {
        on_every_plane!(@plane mutual_tls, MutualTls, $($fact),*);
        on_every_plane!(@plane mutual_https, MutualHttps, $($fact),*);
    };
}
use on_every_tls_plane;

/// A request plane, as a worker is told to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Tcp,
    /// The tcp plane with certificates on both sides.
    MutualTls,
    Http,
    /// The http plane with certificates on both sides.
    MutualHttps,
    /// The frames of the tcp plane by the NATS server on this port.
    Nats(u16),
}

impl Plane {
    pub(super) fn worker(self, change: impl FnOnce(&mut ServerConfig)) -> Worker {
        self.worker_at("127.0.0.1:0", change)
    }

    /// Starts a worker at the address that another one had.
    pub(super) fn worker_at(self, address: &str, change: impl FnOnce(&mut ServerConfig)) -> Worker {
        self.start(address, change, None)
    }

    /// Starts a worker that does something with each request at once.
    fn worker_with(
        self,
        reflex: impl Fn(&Arc<Connection>, u32, &GenerateRequest) + Send + Sync + 'static,
    ) -> Worker {
        self.start("127.0.0.1:0", |_| {}, Some(Box::new(reflex)))
    }

    fn start(
        self,
        address: &str,
        change: impl FnOnce(&mut ServerConfig),
        reflex: Option<Reflex>,
    ) -> Worker {
        let mut config = ServerConfig::new(WorkerId("w".to_owned()));
        change(&mut config);
        let dir = tempfile::tempdir().unwrap();
        if self.is_encrypted() {
            let identity = Some((&*TRUSTED, "worker"));
            config.tls = Some(files(dir.path(), Some(&TRUSTED), identity));
        }
        let place = address.rsplit_once('/').map_or(address, |(_, place)| place);
        let server = match self {
            Self::Tcp | Self::MutualTls => Server::bind(place.parse().unwrap(), config).unwrap(),
            Self::Http | Self::MutualHttps => {
                Server::bind_http(place.parse().unwrap(), config).unwrap()
            }
            Self::Nats(port) => nats::server(port, address, config),
        };
        let address = server.address().unwrap().to_string();
        let (sender, seen) = mpsc::unbounded_channel();
        let probe = Arc::new(Probe {
            seen: sender,
            reflex,
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
        let dir = tempfile::tempdir().unwrap();
        let identity = Some((&*TRUSTED, "processor"));
        let files = files(dir.path(), Some(&TRUSTED), identity);
        let tls = crate::tls::Client::load(files, Some("worker")).unwrap();
        ClientConfig {
            nats: match self {
                Self::Nats(port) => nats::link(port),
                _ => Nats::default(),
            },
            tls: self.is_encrypted().then(|| Arc::new(tls)),
            ..ClientConfig::default()
        }
    }

    fn is_encrypted(self) -> bool {
        match self {
            Self::Tcp | Self::Http | Self::Nats(_) => false,
            Self::MutualTls | Self::MutualHttps => true,
        }
    }
}

/// What a test's worker saw.
pub(super) enum Seen {
    Submit(Arc<Connection>, u32, Box<GenerateRequest>),
    Cancel(u32),
    Closed,
}

/// What a worker does with a request at once.
type Reflex = Box<dyn Fn(&Arc<Connection>, u32, &GenerateRequest) + Send + Sync>;

struct Probe {
    seen: mpsc::UnboundedSender<Seen>,
    reflex: Option<Reflex>,
    blobs: Mutex<HashMap<BlobHash, Bytes>>,
}

impl Handler for Probe {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        if let Some(reflex) = &self.reflex {
            reflex(connection, stream, &request);
        }
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
