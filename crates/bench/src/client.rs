//! The client: HTTP/1.1 over keep-alive connections, as lean as possible, since it shares the machine.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;

/// A request, ready to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    path: &'static str,
    body: Bytes,
}

impl Ask {
    /// A streamed completion of `tokens` tokens.
    pub(crate) fn completion(prompt: &str, tokens: usize) -> Self {
        let body = json!({
            "model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": true, "stream": true,
        });
        Self {
            path: "/v1/completions",
            body: Bytes::from(body.to_string()),
        }
    }

    /// A streamed answer of one token in a conversation, whose turns user and assistant take in turn.
    pub(crate) fn chat(turns: &[String]) -> Self {
        let roles = ["user", "assistant"].into_iter().cycle();
        let turns = roles.zip(turns);
        let messages: Vec<_> = turns
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect();
        let body = json!({
            "model": "bench", "messages": messages, "max_tokens": 1, "temperature": 0,
            "ignore_eos": true, "stream": true,
        });
        Self {
            path: "/v1/chat/completions",
            body: Bytes::from(body.to_string()),
        }
    }

    /// Bytes of the body.
    pub(crate) fn len(&self) -> usize {
        self.body.len()
    }
}

/// What one answer brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// From the request to the first event.
    pub(crate) first: Duration,
    /// Events. Deltas may share one when the reader is slow.
    pub(crate) events: usize,
}

/// One keep-alive connection.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Connects to `host:port`.
    pub(crate) async fn open(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.context("connect")?;
        stream.set_nodelay(true).context("set no delay")?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("connect")?;
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Asks, and reads the answer to its end.
    pub(crate) async fn ask(&mut self, ask: &Ask) -> anyhow::Result<Answer> {
        self.watch(ask, |_| {}).await
    }

    /// Asks, and reads the answer to its end; `seen` is told how many events each piece of it ends.
    pub(crate) async fn watch(
        &mut self,
        ask: &Ask,
        mut seen: impl FnMut(usize),
    ) -> anyhow::Result<Answer> {
        let request = Request::post(ask.path)
            .header("host", "bench")
            .header("content-type", "application/json")
            .body(Full::new(ask.body.clone()))
            .context("make a request")?;
        self.sender.ready().await.context("connection lost")?;
        let start = Instant::now();
        let response = self.sender.send_request(request).await.context("ask")?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let text = body.collect().await.context("read the refusal")?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&text));
        }
        let (mut first, mut events) = (None, 0);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.context("read the answer")?.into_data() else {
                continue;
            };
            first.get_or_insert_with(|| start.elapsed());
            let ended = count_events(&data);
            events += ended;
            seen(ended);
        }
        let first = first.context("an empty answer")?;
        Ok(Answer { first, events })
    }
}

/// Events of a stream, or of a part of one: each ends in an empty line.
fn count_events(data: &[u8]) -> usize {
    data.windows(2).filter(|pair| pair == b"\n\n").count()
}
