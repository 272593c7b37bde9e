//! An engine that says exactly what a test wants it to say, over the real wire.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use rmp::{decode, encode};
use zeromq::{
    DealerSocket, PushSocket, Socket, SocketOptions, SocketRecv, SocketSend, ZmqMessage,
    util::PeerIdentity,
};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something, but not for ever.
pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("in time: {what}"))
}

/// An engine that has dialled in.
pub(crate) struct FakeEngine {
    requests: DealerSocket,
    outputs: PushSocket,
    pub(crate) addresses: Addresses,
}

/// Where an engine connects to.
#[derive(Clone)]
pub(crate) struct Addresses {
    pub(crate) input: String,
    pub(crate) output: String,
}

/// What a worker tells its engine.
#[derive(Debug, PartialEq)]
pub(crate) enum Told {
    Add { id: String },
    Abort { ids: Vec<String> },
    Utility { call_id: i64, method: String },
}

/// The ready response of an ordinary engine.
pub(crate) fn ready() -> HashMap<&'static str, Value> {
    HashMap::from([
        ("vllm_version", Value::Text("0.32.0")),
        ("max_model_len", Value::Number(2048)),
        ("block_size", Value::Number(32)),
        ("something_new", Value::Number(1)),
    ])
}

/// A value of a ready response.
pub(crate) enum Value {
    Text(&'static str),
    Number(u32),
}

/// Dials a handshake address as engine `rank` and says `payload`.
pub(crate) async fn knock(port: u16, rank: u16, payload: &[u8]) -> DealerSocket {
    let mut handshake = dealer(rank);
    soon(
        "handshake",
        handshake.connect(&format!("tcp://127.0.0.1:{port}")),
    )
    .await
    .expect("connect");
    let payload = Bytes::copy_from_slice(payload);
    handshake
        .send(ZmqMessage::from(payload))
        .await
        .expect("send");
    handshake
}

/// HELLO or READY.
pub(crate) fn status(status: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode::write_map_len(&mut bytes, 2).expect("vec");
    encode::write_str(&mut bytes, "status").expect("vec");
    encode::write_str(&mut bytes, status).expect("vec");
    encode::write_str(&mut bytes, "headless").expect("vec");
    encode::write_bool(&mut bytes, true).expect("vec");
    bytes
}

impl FakeEngine {
    /// Dials in and goes through the whole handshake.
    pub(crate) async fn dial(port: u16, ready: &HashMap<&'static str, Value>) -> Self {
        let mut handshake = knock(port, 0, &status("HELLO")).await;
        let init = soon("init", handshake.recv()).await.expect("init");
        let addresses = addresses(&init.into_vec()[0]);
        // A stranger finds the request socket first.
        let mut stranger = dealer(7);
        soon("input", stranger.connect(&addresses.input))
            .await
            .expect("connect");
        let nonsense = ZmqMessage::from(Bytes::from_static(b"\xc1 nonsense"));
        stranger.send(nonsense).await.expect("send");
        let mut engine = Self::connect(&addresses).await;
        engine.send_request_socket(encode_ready(ready)).await;
        let said = ZmqMessage::from(Bytes::from(status("READY")));
        handshake.send(said).await.expect("send");
        engine
    }

    /// Connects as an engine does that was led through its handshake before.
    pub(crate) async fn connect(addresses: &Addresses) -> Self {
        let (mut requests, mut outputs) = (dealer(0), PushSocket::new());
        soon("input", requests.connect(&addresses.input))
            .await
            .expect("connect");
        soon("output", outputs.connect(&addresses.output))
            .await
            .expect("connect");
        Self {
            requests,
            outputs,
            addresses: addresses.clone(),
        }
    }

    async fn send_request_socket(&mut self, payload: Vec<u8>) {
        let message = ZmqMessage::from(Bytes::from(payload));
        self.requests.send(message).await.expect("send");
    }

    /// Waits for the next message from the worker.
    pub(crate) async fn told(&mut self) -> Told {
        let frames = soon("a message", self.requests.recv())
            .await
            .expect("receive")
            .into_vec();
        let mut payload = &frames[1][..];
        match &frames[0][..] {
            b"\x00" => {
                decode::read_array_len(&mut payload).expect("an array");
                Told::Add {
                    id: text(&mut payload),
                }
            }
            b"\x01" => {
                let len = decode::read_array_len(&mut payload).expect("an array");
                Told::Abort {
                    ids: (0..len).map(|_| text(&mut payload)).collect(),
                }
            }
            b"\x03" => {
                decode::read_array_len(&mut payload).expect("an array");
                let client: u32 = decode::read_int(&mut payload).expect("a client");
                assert_eq!(client, 0, "another client index would mute the engine");
                let call_id = decode::read_int(&mut payload).expect("a call id");
                Told::Utility {
                    call_id,
                    method: text(&mut payload),
                }
            }
            other => panic!("message of type {other:?}"),
        }
    }

    /// Waits for an ADD; returns the engine's id.
    pub(crate) async fn added(&mut self) -> String {
        match self.told().await {
            Told::Add { id } => id,
            other => panic!("ADD expected, not {other:?}"),
        }
    }

    /// Says that a step brought `tokens`, and how the request ended if it did.
    pub(crate) async fn output(&mut self, id: &str, tokens: &[u32], finish: Option<u8>) {
        let mut bytes = Vec::new();
        encode::write_array_len(&mut bytes, 2).expect("vec");
        encode::write_uint(&mut bytes, 0).expect("vec");
        encode::write_array_len(&mut bytes, 1).expect("vec");
        encode::write_array_len(&mut bytes, 6).expect("vec");
        encode::write_str(&mut bytes, id).expect("vec");
        encode::write_array_len(&mut bytes, tokens.len() as u32).expect("vec");
        for token in tokens {
            encode::write_uint(&mut bytes, u64::from(*token)).expect("vec");
        }
        for _ in 0..3 {
            encode::write_nil(&mut bytes).expect("vec");
        }
        match finish {
            Some(finish) => drop(encode::write_uint(&mut bytes, u64::from(finish)).expect("vec")),
            None => encode::write_nil(&mut bytes).expect("vec"),
        }
        self.say(bytes).await;
    }

    /// Answers a utility call with nil.
    pub(crate) async fn answer(&mut self, call_id: i64) {
        self.reply(call_id, None).await;
    }

    /// Answers a utility call with nil, or says why it failed.
    pub(crate) async fn reply(&mut self, call_id: i64, failure: Option<&str>) {
        let mut bytes = Vec::new();
        encode::write_array_len(&mut bytes, 5).expect("vec");
        encode::write_uint(&mut bytes, 0).expect("vec");
        encode::write_array_len(&mut bytes, 0).expect("vec");
        encode::write_nil(&mut bytes).expect("vec");
        encode::write_f64(&mut bytes, 0.0).expect("vec");
        encode::write_array_len(&mut bytes, 3).expect("vec");
        encode::write_sint(&mut bytes, call_id).expect("vec");
        match failure {
            Some(message) => encode::write_str(&mut bytes, message).expect("vec"),
            None => encode::write_nil(&mut bytes).expect("vec"),
        }
        encode::write_array_len(&mut bytes, 2).expect("vec");
        encode::write_nil(&mut bytes).expect("vec");
        encode::write_nil(&mut bytes).expect("vec");
        self.say(bytes).await;
    }

    /// Sends any bytes as outputs.
    pub(crate) async fn say(&mut self, bytes: Vec<u8>) {
        let message = ZmqMessage::from(Bytes::from(bytes));
        self.outputs.send(message).await.expect("send");
    }
}

fn dealer(rank: u16) -> DealerSocket {
    let mut options = SocketOptions::default();
    let identity = Bytes::copy_from_slice(&rank.to_le_bytes());
    options.peer_identity(PeerIdentity::try_from(identity).expect("two bytes"));
    DealerSocket::with_options(options)
}

fn encode_ready(ready: &HashMap<&'static str, Value>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode::write_map_len(&mut bytes, ready.len() as u32).expect("vec");
    for (key, value) in ready {
        encode::write_str(&mut bytes, key).expect("vec");
        match value {
            Value::Text(text) => encode::write_str(&mut bytes, text).expect("vec"),
            Value::Number(number) => {
                encode::write_uint(&mut bytes, u64::from(*number)).expect("vec");
            }
        }
    }
    bytes
}

/// Reads the addresses out of the init message, whose shape is the worker's own.
fn addresses(mut init: &[u8]) -> Addresses {
    let init = &mut init;
    assert_eq!(decode::read_map_len(init).expect("a map"), 2);
    assert_eq!(text(init), "addresses");
    let mut found = HashMap::new();
    for _ in 0..decode::read_map_len(init).expect("a map") {
        let name = text(init);
        assert_eq!(
            decode::read_array_len(init).expect("an array"),
            1,
            "one client"
        );
        found.insert(name, text(init));
    }
    let mut take = |name| found.remove(name).expect("an address");
    Addresses {
        input: take("inputs"),
        output: take("outputs"),
    }
}

fn text(bytes: &mut &[u8]) -> String {
    let len = decode::read_str_len(bytes).expect("a text") as usize;
    let (text, rest) = bytes.split_at(len);
    *bytes = rest;
    String::from_utf8(text.to_vec()).expect("UTF-8")
}
