//! The client: HTTP/1.1 over keep-alive connections, as lean as possible, since it shares the machine.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;

/// Where completions are asked for.
const PATH: &str = "/v1/completions";

/// What one answer brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// From the request to the first event, or to the whole answer if it was not streamed.
    pub(crate) first: Duration,
    /// Events with content. Deltas may share one when the reader is slow.
    pub(crate) events: usize,
}

/// One keep-alive connection.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    pub(crate) async fn open(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.context("connect")?;
        stream.set_nodelay(true).context("set no delay")?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("connect")?;
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Asks, and reads the answer to its end.
    pub(crate) async fn ask(&mut self, body: &Bytes) -> anyhow::Result<Answer> {
        let request = Request::post(PATH)
            .header("host", "bench")
            .header("content-type", "application/json")
            .body(Full::new(body.clone()))
            .context("make a request")?;
        self.sender.ready().await.context("connection lost")?;
        let start = Instant::now();
        let response = self.sender.send_request(request).await.context("ask")?;
        let status = response.status();
        let mut body = response.into_body();
        let (mut first, mut events) = (None, 0);
        let mut tail = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.context("read the answer")?.into_data() else {
                continue;
            };
            first.get_or_insert_with(|| start.elapsed());
            events += count_events(&data);
            if !status.is_success() {
                tail.extend_from_slice(&data);
            }
        }
        if !status.is_success() {
            bail!("{status}: {}", String::from_utf8_lossy(&tail));
        }
        let first = first.context("an empty answer")?;
        ensure!(events > 0 || tail.is_empty(), "no events");
        Ok(Answer { first, events })
    }
}

/// Events of a stream, or of a part of one: each ends in an empty line.
fn count_events(data: &[u8]) -> usize {
    data.windows(2).filter(|pair| pair == b"\n\n").count()
}

/// A request for `tokens` tokens, streamed or not.
pub(crate) fn body(prompt: &str, tokens: usize, stream: bool) -> Bytes {
    let body = json!({
        "model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "stream": stream,
    });
    Bytes::from(body.to_string())
}
