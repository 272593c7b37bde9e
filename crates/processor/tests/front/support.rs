//! A processor, workers without engines, and a client that sees what is on the wire.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use stator_common::card::{self, Endpoint, File, Role};
use stator_common::discovery::mem::Mem;
use stator_common::discovery::{Discovery, Registration};
use stator_common::drain::{self, Trigger};
use stator_common::plane::tcp::{Connection, Handler, Server, ServerConfig, ServerHandle};
use stator_common::proto::worker::{Delta, FinishReason, GenerateRequest};
use stator_common::{BlobHash, Card, Code, WorkerId};
use stator_processor::Processor;
use stator_processor::config::Config;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A tokenizer of three words.
pub(crate) const TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "hello": 1, "world": 2}}
}"#;

/// A running processor.
pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) system: Option<SocketAddr>,
    pub(crate) discovery: Mem,
    pub(crate) trigger: Trigger,
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
}

/// Starts a processor on a free port.
pub(crate) async fn start(config: Config) -> Running {
    let discovery = Mem::default();
    let processor = Processor::bind(Config {
        http_port: 0,
        ..config
    })
    .await
    .unwrap();
    let addr = processor.addr();
    let system = processor.system_addr();
    let (trigger, drain) = drain::channel();
    let task = tokio::spawn(processor.serve(Arc::new(discovery.clone()), drain));
    Running {
        addr,
        system,
        discovery,
        trigger,
        task,
    }
}

/// What a worker does with a request.
pub(crate) type Answer = Box<dyn Fn(&GenerateRequest) -> Vec<Delta> + Send + Sync>;

/// Answers with these tokens and the end.
pub(crate) fn tokens(tokens: &[u32]) -> Answer {
    let tokens = tokens.to_vec();
    Box::new(move |_| {
        vec![Delta {
            tokens: tokens.clone(),
            finish: FinishReason::Length.into(),
            ..Delta::default()
        }]
    })
}

/// Refuses everything.
pub(crate) fn refuses(code: Code) -> Answer {
    Box::new(move |_| {
        vec![stator_common::plane::tcp::delta::failed(
            0,
            code,
            "refused by the test",
        )]
    })
}

/// Says nothing.
pub(crate) fn silent() -> Answer {
    Box::new(|_| Vec::new())
}

/// A worker that is served and registered.
pub(crate) struct Worker {
    pub(crate) state: Arc<WorkerState>,
    registration: Option<Registration>,
    server: Option<ServerHandle>,
    _trigger: Trigger,
}

pub(crate) struct WorkerState {
    answer: Answer,
    files: BTreeMap<String, Bytes>,
    pub(crate) submitted: AtomicU32,
    pub(crate) cancelled: AtomicU32,
}

impl Handler for WorkerState {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        self.submitted.fetch_add(1, Ordering::SeqCst);
        let mut deltas = (self.answer)(&request);
        for delta in &mut deltas {
            delta.stream = stream;
        }
        connection.send(&mut deltas, None);
    }

    fn cancel(&self, _: &Arc<Connection>, _: u32) {
        self.cancelled.fetch_add(1, Ordering::SeqCst);
    }

    fn closed(&self, _: &Arc<Connection>) {}

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        self.files
            .values()
            .find(|bytes| BlobHash::of(bytes) == *hash)
            .cloned()
    }
}

impl Worker {
    /// Starts a worker of the model `model` named `id`.
    pub(crate) async fn start(discovery: &Mem, id: &str, answer: Answer) -> Self {
        Self::customized(discovery, id, answer, |_| {}).await
    }

    /// Starts a worker whose card is changed before it is published.
    pub(crate) async fn customized(
        discovery: &Mem,
        id: &str,
        answer: Answer,
        change: impl FnOnce(&mut Card),
    ) -> Self {
        let files = BTreeMap::from([(
            "tokenizer.json".to_owned(),
            Bytes::from_static(TOKENIZER.as_bytes()),
        )]);
        let worker = WorkerId(id.to_owned());
        let config = ServerConfig::new(worker.clone());
        let server = Server::bind("127.0.0.1:0".parse().unwrap(), config).unwrap();
        let mut card = Card {
            worker,
            role: Role::Agg,
            endpoint: Endpoint {
                namespace: "test".to_owned(),
                component: "backend".to_owned(),
                endpoint: "generate".to_owned(),
            },
            address: server.local_addr().unwrap().to_string(),
            model: card::Model {
                names: vec!["model".to_owned(), "org/alias".to_owned()],
                root: "/models/model".to_owned(),
                max_model_len: 128,
                vocab_size: 3,
                block_size: 16,
                kv_blocks: 64,
                max_num_seqs: 4,
                max_num_batched_tokens: 64,
                dp_size: 1,
                files: files
                    .iter()
                    .map(|(name, bytes)| (name.clone(), File::of(bytes)))
                    .collect(),
                tool_call_parser: None,
                reasoning_parser: None,
                vllm_version: "0.32.0".to_owned(),
                max_logprobs: 20,
            },
        };
        change(&mut card);
        let state = Arc::new(WorkerState {
            answer,
            files,
            submitted: AtomicU32::new(0),
            cancelled: AtomicU32::new(0),
        });
        let (trigger, drain) = drain::channel();
        let server = server.spawn(Arc::clone(&state), drain);
        let registration = Some(discovery.register(card).await.unwrap());
        Self {
            state,
            registration,
            server: Some(server),
            _trigger: trigger,
        }
    }

    /// Leaves discovery and closes every connection.
    pub(crate) async fn stop(mut self) {
        self.registration.take();
        self.disconnect().await;
    }

    /// Closes every connection and takes no new one, but stays in discovery.
    pub(crate) async fn disconnect(&mut self) {
        if let Some(server) = self.server.take() {
            server.close().await;
        }
    }

    pub(crate) fn submitted(&self) -> u32 {
        self.state.submitted.load(Ordering::SeqCst)
    }
}

/// An answer whose body has arrived.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answered {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Checks that the body is an OpenAI error that agrees with the status, and returns its message.
    pub(crate) fn error(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], self.status, "{body}");
        assert!(
            error["type"].is_string() && error.get("param").is_some(),
            "{body}"
        );
        error["message"].as_str().unwrap().to_owned()
    }
}

/// Sends a request on a connection of its own and returns the whole answer.
pub(crate) async fn send(addr: SocketAddr, request: Request<Full<Bytes>>) -> Answered {
    let stream = TcpStream::connect(addr).await.unwrap();
    send_on(stream, request).await
}

/// Sends a request over HTTP/1.1 on this stream.
pub(crate) async fn send_on(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answered {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    collect(sender.send_request(request).await.unwrap()).await
}

/// Sends a request over HTTP/2 on this stream.
pub(crate) async fn send_h2_on(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answered {
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    collect(sender.send_request(request).await.unwrap()).await
}

async fn collect(response: Response<hyper::body::Incoming>) -> Answered {
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answered {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    }
}

pub(crate) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path)
        .header("host", "test")
        .body(Full::default())
        .unwrap()
}

pub(crate) fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", "test")
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .unwrap()
}

/// A completion of one token, its prompt given as tokens.
pub(crate) fn completion() -> Request<Full<Bytes>> {
    post(
        "/v1/completions",
        r#"{"model": "model", "prompt": [1, 2], "max_tokens": 1}"#,
    )
}

/// Asks until the answer is as wanted.
pub(crate) async fn until(
    addr: SocketAddr,
    path: &str,
    wanted: impl Fn(&Answered) -> bool,
) -> Answered {
    let patience = Duration::from_secs(30);
    let ask = async {
        loop {
            let answered = send(addr, get(path)).await;
            if wanted(&answered) {
                return answered;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(patience, ask).await {
        Ok(answered) => answered,
        Err(_) => panic!(
            "{path} never became as wanted: {:?}",
            send(addr, get(path)).await
        ),
    }
}

/// Waits until the model answers through `n` connected targets.
pub(crate) async fn until_open(addr: SocketAddr, n: usize) {
    until(addr, "/workers", |answered| {
        let body = answered.json();
        let targets = body["models"].as_array().into_iter().flatten();
        let targets = targets.flat_map(|model| model["targets"].as_array().into_iter().flatten());
        targets
            .filter(|target| target["availability"] == "open")
            .count()
            == n
    })
    .await;
}
