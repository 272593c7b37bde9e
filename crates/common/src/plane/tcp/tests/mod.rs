//! Both ends in one process, over real sockets.

mod peers;
mod slow;
mod streams;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use super::frame;
use crate::{
    Code,
    drain::{self, Trigger},
    ids::{BlobHash, WorkerId},
    plane::{
        Client, ClientConfig, Connection, DeltaStream, Handler, PlaneError, Server, ServerConfig,
        ServerHandle, State, delta,
    },
    proto::worker::{Delta, FinishReason, GenerateRequest, Load},
};

/// What a test's worker saw.
enum Seen {
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

struct Worker {
    address: String,
    seen: mpsc::UnboundedReceiver<Seen>,
    probe: Arc<Probe>,
    trigger: Trigger,
    handle: ServerHandle,
}

fn worker(change: impl FnOnce(&mut ServerConfig)) -> Worker {
    worker_at("127.0.0.1:0", change)
}

fn worker_at(address: &str, change: impl FnOnce(&mut ServerConfig)) -> Worker {
    let mut config = ServerConfig::new(WorkerId("w".to_owned()));
    change(&mut config);
    let server = Server::bind(address.parse().unwrap(), config).unwrap();
    let address = server.address().unwrap().to_string();
    let (sender, seen) = mpsc::unbounded_channel();
    let probe = Arc::new(Probe {
        seen: sender,
        blobs: Mutex::default(),
    });
    let (trigger, drain) = drain::channel();
    let handle = server.spawn(probe.clone(), drain);
    Worker {
        address,
        seen,
        probe,
        trigger,
        handle,
    }
}

impl Worker {
    async fn client(&self) -> Client {
        let client = Client::connect(&self.address, ClientConfig::default());
        client.ready().await.unwrap();
        client
    }

    async fn submitted(&mut self) -> (Arc<Connection>, u32, GenerateRequest) {
        match self.seen.recv().await {
            Some(Seen::Submit(connection, stream, request)) => (connection, stream, *request),
            _ => panic!("expected a submit"),
        }
    }
}

fn request(id: &str) -> GenerateRequest {
    GenerateRequest {
        request_id: id.to_owned(),
        prompt_tokens: Bytes::from_static(&[1, 0, 0, 0]),
        ..GenerateRequest::default()
    }
}

fn tokens(stream: u32, tokens: impl Into<Vec<u32>>) -> Delta {
    Delta {
        stream,
        tokens: tokens.into(),
        ..Delta::default()
    }
}

fn last(stream: u32, finish: FinishReason) -> Delta {
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
