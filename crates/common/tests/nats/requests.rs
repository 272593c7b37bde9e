//! Requests over NATS, where it is not the same as over TCP: the server goes, and messages are small.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use stator_common::{
    BlobHash, Code, WorkerId,
    drain::{self, Trigger},
    plane::{
        Client, ClientConfig, Connection, Handler, Server, ServerConfig, ServerHandle, State,
        nats::Listener,
    },
    proto::worker::{Delta, FinishReason, GenerateRequest},
};
use stator_testkit::{
    client::{read_to_end, request},
    nats::NatsServer,
    wait,
};

use crate::{link, name};

/// Answers each request with its prompt's length, and ends those of one token only when it is told to.
#[derive(Default)]
struct Echo {
    open: Mutex<Vec<(Arc<Connection>, u32)>>,
    blob: Mutex<Bytes>,
}

impl Handler for Echo {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        let length = u32::try_from(request.prompt_tokens.len() / 4).unwrap();
        let mut delta = Delta {
            stream,
            tokens: vec![length],
            ..Delta::default()
        };
        if length == 1 {
            self.open.lock().push((connection.clone(), stream));
        } else {
            delta.finish = FinishReason::Length.into();
        }
        connection.send(&mut vec![delta], None);
    }

    fn cancel(&self, _: &Arc<Connection>, _: u32) {}

    fn closed(&self, connection: &Arc<Connection>) {
        let gone = connection.id();
        self.open.lock().retain(|(open, _)| open.id() != gone);
    }

    fn blob(&self, _: &BlobHash) -> Option<Bytes> {
        Some(self.blob.lock().clone())
    }
}

struct Worker {
    echo: Arc<Echo>,
    address: String,
    _serves: (ServerHandle, Trigger),
}

impl Worker {
    async fn start(server: &NatsServer) -> Self {
        let subject = format!("stator.test.{}", name());
        let listener = Listener::bind(&link(server), subject).await.unwrap();
        let served = Server::on(
            Arc::new(listener),
            ServerConfig::new(WorkerId("w".to_owned())),
        );
        let address = served.address().unwrap().to_string();
        let echo = Arc::new(Echo::default());
        let (trigger, drain) = drain::channel();
        Self {
            _serves: (served.spawn(echo.clone(), drain), trigger),
            echo,
            address,
        }
    }

    async fn client(&self, server: &NatsServer) -> Client {
        let config = ClientConfig {
            nats: link(server),
            ..ClientConfig::default()
        };
        let client = Client::connect(self.address.clone(), config);
        client.ready().await.unwrap();
        client
    }
}

#[tokio::test]
async fn a_server_that_goes_ends_streams_at_both_ends_and_the_client_comes_back_by_itself() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    let worker = Worker::start(&server).await;
    let client = worker.client(&server).await;
    for _ in 0..2 {
        let mut stream = client.generate(&request([7], 9)).unwrap();
        assert_eq!(stream.next().await.unwrap().tokens, [1]);
        server.kill();
        let end = read_to_end(stream).await;
        let code = Code::from(end.error.unwrap().code());
        assert_eq!(code, Code::Disconnected);
        wait::until("the worker drops it", || worker.echo.open.lock().is_empty()).await;
        let refused = client.generate(&request([7], 9)).err().unwrap();
        assert_eq!(refused.code(), Code::Unavailable);
        server.restart().await;
        client.ready().await.unwrap();
        let all = read_to_end(client.generate(&request(0..3, 1)).unwrap()).await;
        assert_eq!(all.tokens, [3]);
    }
}

#[tokio::test]
async fn messages_of_64_kib_carry_a_blob_of_40_mib_and_a_prompt_of_3() {
    let Some(server) = NatsServer::start_with("max_payload: 65536").await else {
        return;
    };
    let worker = Worker::start(&server).await;
    let client = worker.client(&server).await;
    let blob: Bytes = (0..10_u32 << 20).flat_map(u32::to_le_bytes).collect();
    *worker.echo.blob.lock() = blob.clone();
    let fetched = client.blob(&BlobHash::of(&blob)).await.unwrap();
    assert!(fetched == blob);
    let all = client.generate(&request(0..800_000, 1)).unwrap();
    assert_eq!(read_to_end(all).await.tokens, [800_000]);
}

#[tokio::test]
async fn a_processor_whose_server_is_not_there_says_which_flag_names_it() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    server.kill();
    let config = ClientConfig {
        nats: link(&server),
        ..ClientConfig::default()
    };
    let client = Client::connect("nats://stator.plane.n.w", config);
    let mut states = client.state();
    let named = |state: &State| matches!(state, State::Connecting { reason } if reason.contains("--nats-server"));
    states.wait_for(named).await.unwrap();
}
