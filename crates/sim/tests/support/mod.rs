//! A bare frontend: it owns the handshake and speaks msgpack, and knows nothing of the engine client.

#![allow(dead_code, unreachable_pub)] // each test file uses a part of it
#![allow(clippy::unwrap_used)] // a helper of tests panics as a test does

pub mod trace;

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use stator_sim::wire::WireVersion;
use stator_sim::wire::msgpack::{Value, decode};
use stator_sim::{Config, Faults, Timing, cli};
use zeromq::{
    DealerSocket, PullSocket, RouterSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage,
};

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Sampling parameters as pairs.
pub type Params<'a> = &'a [(&'a str, Value)];

/// A frontend with its three sockets.
pub struct Frontend {
    handshake: RouterSocket,
    pub port: u16,
    pub input_endpoint: String,
    pub output_endpoint: String,
    input: RouterSocket,
    output: PullSocket,
    identity: Bytes,
    pub ready: Value,
    calls: i64,
    /// Messages that were read past.
    later: VecDeque<Vec<Bytes>>,
}

async fn bind(socket: &mut impl Socket, endpoint: &str) -> String {
    socket.bind(endpoint).await.unwrap().to_string()
}

impl Frontend {
    /// Binds everything; no engine is there yet.
    pub async fn bind() -> Self {
        let (mut handshake, mut input, mut output) =
            (RouterSocket::new(), RouterSocket::new(), PullSocket::new());
        let endpoint = bind(&mut handshake, "tcp://127.0.0.1:0").await;
        Self {
            port: endpoint.rsplit_once(':').unwrap().1.parse().unwrap(),
            input_endpoint: bind(&mut input, "tcp://127.0.0.1:0").await,
            output_endpoint: bind(&mut output, "tcp://127.0.0.1:0").await,
            handshake,
            input,
            output,
            identity: Bytes::new(),
            ready: Value::Nil,
            calls: 0,
            later: VecDeque::new(),
        }
    }

    /// Goes through the handshake. The states that the engine reported, in order.
    pub async fn greet(&mut self) -> Vec<String> {
        let work = async {
            let mut states = Vec::new();
            while self.ready.is_nil() || states.last().is_none_or(|state| state != "READY") {
                tokio::select! {
                    message = self.handshake.recv() => {
                        let frames = message.unwrap().into_vec();
                        let state = decode(&frames[1]).unwrap();
                        let state = state.get("status").unwrap().as_str().unwrap().to_owned();
                        if state == "HELLO" {
                            let init = Value::map([
                                ("addresses", Value::map([
                                    ("inputs", vec![self.input_endpoint.clone()].into()),
                                    ("outputs", vec![self.output_endpoint.clone()].into()),
                                    ("coordinator_input", Value::Nil),
                                    ("coordinator_output", Value::Nil),
                                    ("frontend_stats_publish_address", Value::Nil),
                                ])),
                                ("parallel_config", Value::Map(vec![])),
                            ]);
                            let reply = message_of(&[frames[0].clone(), init.to_vec().into()]);
                            self.handshake.send(reply).await.unwrap();
                        }
                        states.push(state);
                    }
                    message = self.input.recv() => {
                        let frames = message.unwrap().into_vec();
                        self.identity = frames[0].clone();
                        self.ready = decode(&frames[1]).unwrap();
                    }
                }
            }
            states
        };
        tokio::time::timeout(PATIENCE, work)
            .await
            .expect("an engine dials in")
    }

    /// Goes away, and comes back at the same endpoints with nothing but their names.
    pub async fn restart(self) -> Self {
        let (input_endpoint, output_endpoint) = (self.input_endpoint, self.output_endpoint);
        self.input.close().await;
        self.output.close().await;
        let (mut input, mut output) = (RouterSocket::new(), PullSocket::new());
        bind(&mut input, &input_endpoint).await;
        bind(&mut output, &output_endpoint).await;
        Self {
            input_endpoint,
            output_endpoint,
            input,
            output,
            later: VecDeque::new(),
            ..self
        }
    }

    pub async fn send(&mut self, kind: u8, data: Vec<u8>) {
        let message = message_of(&[self.identity.clone(), vec![kind].into(), data.into()]);
        // A ROUTER does not know a peer before it has dialled.
        let send = async {
            while self.input.send(message.clone()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, send)
            .await
            .expect("the engine dials in");
    }

    /// An ADD of the nine required fields.
    pub async fn add(&mut self, id: &str, prompt: &[u32], max_tokens: u32, params: Params<'_>) {
        let fields = add_fields(id, prompt, max_tokens, params);
        self.send(0, Value::Array(fields).to_vec()).await;
    }

    pub async fn abort(&mut self, ids: &[&str]) {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        self.send(1, Value::from(ids).to_vec()).await;
    }

    /// A utility call's failure message or result.
    pub async fn call(&mut self, method: &str, args: Vec<Value>) -> Result<Value, String> {
        let id = self.post(method, args).await;
        self.answer_to(id).await
    }

    /// Sends a call without waiting for its answer.
    pub async fn post(&mut self, method: &str, args: Vec<Value>) -> i64 {
        self.calls += 1;
        let call = vec![
            0u32.into(),
            Value::Int(self.calls),
            method.into(),
            Value::Array(args),
        ];
        self.send(3, Value::Array(call).to_vec()).await;
        self.calls
    }

    pub async fn answer_to(&mut self, call: i64) -> Result<Value, String> {
        let mut passed = Vec::new();
        loop {
            let message = self.next().await;
            let value = decode(&message[0]).unwrap();
            let utility = value
                .as_array()
                .map_or(Value::Nil, |fields| fields[4].clone());
            if let Some([id, failure, result]) = utility.as_array()
                && id.as_i64() == Some(call)
            {
                for message in passed.into_iter().rev() {
                    self.later.push_front(message);
                }
                return match failure.as_str() {
                    Some(failure) => Err(failure.to_owned()),
                    None => Ok(result.as_array().unwrap()[1].clone()),
                };
            }
            passed.push(message);
        }
    }

    /// The next message: its frames.
    pub async fn next(&mut self) -> Vec<Bytes> {
        if let Some(message) = self.later.pop_front() {
            return message;
        }
        let message = tokio::time::timeout(PATIENCE, self.output.recv()).await;
        message
            .expect("the engine says something")
            .unwrap()
            .into_vec()
    }

    /// Reads until a request ends; its outputs. Those of other requests are passed over.
    pub async fn finish(&mut self, id: &str) -> Answer {
        let mut answer = Answer::default();
        while answer.finish.is_none() {
            let message = self.next().await;
            answer.take(id, &message);
        }
        answer
    }

    /// Whether the engine still answers; what comes meanwhile is kept.
    pub async fn is_deaf(&mut self, patience: Duration) -> bool {
        let call = self.call("is_scheduler_paused", vec![]);
        tokio::time::timeout(patience, call).await.is_err()
    }
}

/// The required fields of an ADD.
pub fn add_fields(id: &str, prompt: &[u32], max_tokens: u32, params: Params<'_>) -> Vec<Value> {
    let mut sampling = vec![
        ("temperature".into(), Value::Float(0.0)),
        ("max_tokens".into(), max_tokens.into()),
        ("output_kind".into(), Value::Int(1)),
    ];
    sampling.extend(
        params
            .iter()
            .map(|(key, value)| (Value::from(*key), value.clone())),
    );
    vec![
        id.into(),
        prompt.to_vec().into(),
        Value::Nil,
        Value::Map(sampling),
        Value::Nil,
        Value::Float(0.0),
        Value::Nil,
        Value::Nil,
        Value::Nil,
    ]
}

/// All outputs of one request.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub finish: Option<u64>,
    pub stop_reason: Option<u64>,
    /// Every output whole, and the number of frames beside the message's first.
    pub outputs: Vec<(Vec<Value>, usize)>,
}

impl Answer {
    /// Takes what a message says of a request.
    pub fn take(&mut self, id: &str, message: &[Bytes]) {
        let value = decode(&message[0]).unwrap_or(Value::Nil);
        let Some(outputs) = value.as_array().map(|fields| fields[1].as_array().unwrap()) else {
            return;
        };
        for output in outputs {
            let fields = output.as_array().unwrap();
            if fields[0].as_str() != Some(id) {
                continue;
            }
            let tokens = fields[1].as_array().unwrap().iter();
            self.tokens
                .extend(tokens.map(|token| token.as_u32().unwrap()));
            self.finish = self.finish.or(fields[5].as_u64());
            self.stop_reason = self.stop_reason.or(fields[6].as_u64());
            self.outputs.push((fields.to_vec(), message.len() - 1));
        }
    }

    /// The prefill statistics of the first output.
    pub fn prefill(&self, key: &str) -> Option<u64> {
        let stats = &self.outputs.first()?.0[11];
        stats.get(key)?.as_u64()
    }

    pub fn kv_transfer_params(&self) -> Option<Value> {
        let (last, _) = self.outputs.last()?;
        (!last[8].is_nil()).then(|| last[8].clone())
    }
}

pub fn message_of<const N: usize>(frames: &[Bytes; N]) -> ZmqMessage {
    ZmqMessage::try_from(frames.to_vec()).unwrap()
}

/// A subscriber of KV events and its side door.
pub struct Subscriber {
    events: SubSocket,
    replay: DealerSocket,
}

impl Subscriber {
    pub async fn connect(ready: &Value) -> Self {
        let config = ready.get("kv_events_config").unwrap();
        let endpoint = |key| {
            let endpoint = config.get(key).unwrap().as_str().unwrap();
            endpoint.replace('*', "127.0.0.1")
        };
        let (mut events, mut replay) = (SubSocket::new(), DealerSocket::new());
        events.connect(&endpoint("endpoint")).await.unwrap();
        events.subscribe("").await.unwrap();
        replay.connect(&endpoint("replay_endpoint")).await.unwrap();
        Self { events, replay }
    }

    /// The next batch: its number and its events.
    pub async fn next(&mut self) -> (u64, Vec<Value>) {
        let message = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        let frames = message.expect("events are published").unwrap().into_vec();
        batch(&frames)
    }

    /// What was published from a number on.
    pub async fn replay(&mut self, start: u64) -> Vec<(u64, Vec<Value>)> {
        let ask = message_of(&[Bytes::new(), start.to_be_bytes().to_vec().into()]);
        self.replay.send(ask).await.unwrap();
        let mut batches = Vec::new();
        loop {
            let message = tokio::time::timeout(PATIENCE, self.replay.recv()).await;
            let frames = message.expect("a replay has an end").unwrap().into_vec();
            if frames[3].is_empty() {
                assert_eq!(frames[2].as_ref(), [0xff; 8]);
                return batches;
            }
            batches.push(batch(&frames[1..]));
        }
    }
}

fn batch(frames: &[Bytes]) -> (u64, Vec<Value>) {
    let seq = u64::from_be_bytes(frames[1][..8].try_into().unwrap());
    let value = decode(&frames[2]).unwrap();
    (
        seq,
        value.as_array().unwrap()[1].as_array().unwrap().to_vec(),
    )
}

/// A model folder of 64 tokens, of which 0 to 3 are special; 2 is EOS.
pub fn model_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"vocab_size": 64, "max_position_embeddings": 512, "eos_token_id": [2, 3],
        "bos_token_id": 1, "pad_token_id": 0}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

/// An engine's configuration as its command line gives it, with no pace.
pub fn config(port: u16, flags: &str) -> Config {
    let folder = model_folder();
    let line = format!(
        "serve {} --headless --data-parallel-address 127.0.0.1 --data-parallel-rpc-port {port} \
         --block-size 8 --max-num-seqs 4 {flags}",
        folder.path().display()
    );
    let configs = cli::parse(line.split_whitespace().map(str::to_owned))
        .unwrap()
        .unwrap();
    let config = configs.into_iter().next().unwrap();
    Config {
        timing: Timing {
            speedup: 0.0,
            ..config.timing
        },
        ..config
    }
}

/// The same with another wire or with faults.
pub fn with_wire(config: Config, wire: WireVersion) -> Config {
    Config { wire, ..config }
}

pub fn with_faults(config: Config, faults: Faults) -> Config {
    Config { faults, ..config }
}
