//! A worker that does what a test says, token by token.
//!
//! Its tokenizer has one token per byte, so tokens can be written as text.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use stator_common::card::{self, Endpoint, File, Role};
use stator_common::discovery::{Discovery, Registration};
use stator_common::drain::{self, Trigger};
use stator_common::plane::tcp::{Connection, Handler, Server, ServerConfig, ServerHandle};
use stator_common::proto::worker::{Delta, FinishReason, GenerateRequest, Sampling, TokenLogprobs};
use stator_common::{BlobHash, Card, WorkerId};
use stator_processor::config::Config;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;

use crate::support::{self, Answered, Running, post, send, until_open};

/// The token that ends an answer.
pub(crate) const END: u32 = 256;
/// Another one that does, by `generation_config.json`.
pub(crate) const OTHER_END: u32 = 257;

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
    {% if tools %}[{{ tools | map(attribute='function.name') | join(',') }}]{% endif %}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// A processor with one scripted worker.
pub(crate) struct Stage {
    pub(crate) addr: SocketAddr,
    attempts: UnboundedReceiver<Attempt>,
    cancels: UnboundedReceiver<u32>,
    _processor: Running,
    _registration: Registration,
    _server: ServerHandle,
    _trigger: Trigger,
}

/// A request that the worker has received.
pub(crate) struct Attempt {
    connection: Arc<Connection>,
    pub(crate) stream: u32,
    pub(crate) request: GenerateRequest,
}

struct Script {
    files: BTreeMap<String, Bytes>,
    attempts: UnboundedSender<Attempt>,
    cancels: UnboundedSender<u32>,
}

impl Handler for Script {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        let connection = Arc::clone(connection);
        drop(self.attempts.send(Attempt {
            connection,
            stream,
            request,
        }));
    }

    fn cancel(&self, _: &Arc<Connection>, stream: u32) {
        self.cancels.send(stream).ok();
    }

    fn closed(&self, _: &Arc<Connection>) {}

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        self.files
            .values()
            .find(|bytes| BlobHash::of(bytes) == *hash)
            .cloned()
    }
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::customized(Config::default(), |_| {}).await
    }

    pub(crate) async fn customized(config: Config, change: impl FnOnce(&mut card::Model)) -> Self {
        let processor = support::start(config).await;
        let (attempts_to, attempts) = mpsc::unbounded_channel();
        let (cancels_to, cancels) = mpsc::unbounded_channel();
        let script = Script {
            files: files(),
            attempts: attempts_to,
            cancels: cancels_to,
        };
        let worker = WorkerId("scripted".to_owned());
        let address = "127.0.0.1:0".parse().expect("an address");
        let server = Server::bind(address, ServerConfig::new(worker.clone())).expect("a free port");
        let mut model = model(&script.files);
        change(&mut model);
        let card = Card {
            worker,
            role: Role::Agg,
            endpoint: Endpoint {
                namespace: "test".to_owned(),
                component: "backend".to_owned(),
                endpoint: "generate".to_owned(),
            },
            address: server.local_addr().expect("a bound socket").to_string(),
            model,
        };
        let (trigger, drain) = drain::channel();
        let server = server.spawn(Arc::new(script), drain);
        let registration = processor
            .discovery
            .register(card)
            .await
            .expect("memory has room");
        until_open(processor.addr, 1).await;
        Self {
            addr: processor.addr,
            attempts,
            cancels,
            _processor: processor,
            _registration: registration,
            _server: server,
            _trigger: trigger,
        }
    }

    /// Sends a request while the test plays the worker.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> JoinHandle<Answered> {
        tokio::spawn(send(self.addr, post(path, body.to_string())))
    }

    /// Waits for the next request at the worker.
    pub(crate) async fn attempt(&mut self) -> Attempt {
        self.attempts
            .recv()
            .await
            .expect("the worker lives as long as the stage")
    }

    /// Waits until the worker is told to cancel, and returns the stream.
    pub(crate) async fn cancelled(&mut self) -> u32 {
        self.cancels
            .recv()
            .await
            .expect("the worker lives as long as the stage")
    }

    /// Sends a request that must be refused before it reaches the worker; returns status and error.
    pub(crate) async fn refused(&mut self, path: &str, body: &str) -> (u16, Value) {
        let answered = send(self.addr, post(path, body.to_owned())).await;
        assert!(
            self.attempts.try_recv().is_err(),
            "{body} reached the worker"
        );
        answered.error();
        (answered.status, answered.json()["error"].clone())
    }
}

/// Sends a request and returns the answer as it begins.
pub(crate) async fn open(addr: SocketAddr, path: &str, body: &Value) -> Reading {
    let stream = TcpStream::connect(addr)
        .await
        .expect("the processor listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("HTTP");
    let connection = tokio::spawn(async move { drop(connection.await) });
    let response = sender
        .send_request(post(path, body.to_string()))
        .await
        .expect("an answer");
    Reading {
        status: response.status().as_u16(),
        body: response.into_body(),
        connection,
        sender,
    }
}

/// An answer that is being read.
pub(crate) struct Reading {
    pub(crate) status: u16,
    body: Incoming,
    connection: JoinHandle<()>,
    sender: hyper::client::conn::http1::SendRequest<http_body_util::Full<Bytes>>,
}

impl Reading {
    /// Returns what arrives next; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<String> {
        let frame = self
            .body
            .frame()
            .await?
            .expect("the answer does not break off");
        let data = frame.into_data().expect("no trailers");
        Some(String::from_utf8(data.to_vec()).expect("events are text"))
    }

    /// Goes away in the middle of the answer.
    pub(crate) fn leave(self) {
        drop(self.sender);
        self.connection.abort();
    }
}

impl Attempt {
    pub(crate) fn send(&self, delta: Delta) {
        self.connection.send(
            &mut vec![Delta {
                stream: self.stream,
                ..delta
            }],
            None,
        );
    }

    /// Generates the tokens of a text.
    pub(crate) fn say(&self, text: &str) {
        self.send(Delta {
            tokens: tokens(text),
            ..Delta::default()
        });
    }

    /// Ends with the end-of-sequence token.
    pub(crate) fn end(&self) {
        self.finish(&[END], FinishReason::Stop);
    }

    /// Ends with these tokens.
    pub(crate) fn finish(&self, tokens: &[u32], reason: FinishReason) {
        let tokens = tokens.to_vec();
        self.send(Delta {
            tokens,
            finish: reason.into(),
            ..Delta::default()
        });
    }

    pub(crate) fn sampling(&self) -> &Sampling {
        self.request
            .sampling
            .as_ref()
            .expect("every request has sampling parameters")
    }

    /// Returns the prompt as text.
    pub(crate) fn prompt(&self) -> String {
        let words = self.request.prompt_tokens.chunks_exact(4);
        let bytes = words.map(|word| word[0]).collect();
        String::from_utf8(bytes).expect("the prompt is text")
    }
}

/// Returns the tokens of a text: its bytes.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Returns a position with these candidates; the chosen token is first.
pub(crate) fn position(candidates: &[(char, f32)], rank: u32) -> TokenLogprobs {
    TokenLogprobs {
        tokens: candidates.iter().map(|(token, _)| *token as u32).collect(),
        logprobs: candidates.iter().map(|(_, logprob)| *logprob).collect(),
        rank,
    }
}

/// Returns the JSON of a stream's events; checks that it ends with `[DONE]`.
pub(crate) fn events(answered: &Answered) -> Vec<Value> {
    let text = answered.text();
    let body = text
        .strip_suffix("data: [DONE]\n\n")
        .unwrap_or_else(|| panic!("no end in {text}"));
    let events = body.split_terminator("\n\n");
    events
        .map(|event| {
            let data = event
                .strip_prefix("data: ")
                .unwrap_or_else(|| panic!("{event}"));
            serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"))
        })
        .collect()
}

fn model(files: &BTreeMap<String, Bytes>) -> card::Model {
    card::Model {
        names: vec!["model".to_owned(), "alias".to_owned()],
        root: "/models/model".to_owned(),
        max_model_len: 512,
        vocab_size: 260,
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
    }
}

fn files() -> BTreeMap<String, Bytes> {
    let added = ["<|end|>", "<|other|>", "<|start|>", "<|pad|>"]
        .iter()
        .zip(256..);
    let added: Vec<Value> = added
        .map(|(content, id): (_, u32)| {
            json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": byte_vocab(), "merges": []},
    });
    let files = [
        ("tokenizer.json", tokenizer.to_string()),
        (
            "tokenizer_config.json",
            json!({"eos_token": "<|end|>"}).to_string(),
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": [256, 257], "top_k": 7}).to_string(),
        ),
        ("chat_template.jinja", TEMPLATE.to_owned()),
    ];
    files
        .map(|(name, text)| (name.to_owned(), Bytes::from(text)))
        .into()
}

/// Every byte, spelled as byte-level vocabularies do: printable ones as they are, the others from U+0100 on.
fn byte_vocab() -> Map<String, Value> {
    let mut next = 0x100;
    let spell = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        }
    };
    (0..=u8::MAX)
        .map(spell)
        .zip(0..)
        .map(|(c, id): (char, u32)| (c.to_string(), id.into()))
        .collect()
}
