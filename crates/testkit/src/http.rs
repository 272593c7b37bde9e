//! A client of HTTP that shows what is on the wire: one connection a request, whole answers or piece by piece.

use std::net::SocketAddr;
use std::time::Duration;

use ::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::wait::PAUSE;

/// Longest wait of [`until`]: beyond what a server without an engine takes for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// An answer whose body has arrived.
#[derive(Debug)]
pub struct Answered {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answered {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the answer is text")
    }

    /// Checks that the body is an OpenAI error that agrees with the status, and returns its message.
    pub fn error(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], self.status, "{body}");
        assert!(
            error["type"].is_string() && error.get("param").is_some(),
            "{body}"
        );
        error["message"].as_str().expect("a message").to_owned()
    }

    /// Returns the JSON of a stream's events; checks that it ends with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
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
}

/// An answer that is being read.
pub struct Reading {
    pub status: u16,
    body: Incoming,
    connection: JoinHandle<()>,
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Reading {
    /// Returns what arrives next; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        let frame = self.body.frame().await?;
        let frame = frame.expect("the answer does not break off");
        let data = frame.into_data().expect("no trailers");
        Some(String::from_utf8(data.to_vec()).expect("events are text"))
    }

    /// Goes away in the middle of the answer.
    pub fn leave(self) {
        drop(self.sender);
        self.connection.abort();
    }
}

/// Returns a GET request.
pub fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path)
        .header("host", "test")
        .body(Full::default())
        .expect("a request")
}

/// Returns a POST request whose body says that it is JSON.
pub fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", "test")
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .expect("a request")
}

/// Sends a request on a connection of its own and returns the whole answer.
pub async fn send(addr: SocketAddr, request: Request<Full<Bytes>>) -> Answered {
    send_on(connect(addr).await, request).await
}

/// Sends a request over HTTP/1.1 on this stream.
pub async fn send_on(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answered {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    whole(sender.send_request(request).await.expect("an answer")).await
}

/// Sends a request over HTTP/2 on this stream.
pub async fn send_h2_on(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Answered {
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("HTTP/2");
    tokio::spawn(connection);
    whole(sender.send_request(request).await.expect("an answer")).await
}

/// Sends a request and returns the answer as it begins.
pub async fn open(addr: SocketAddr, path: &str, body: &Value) -> Reading {
    let stream = TokioIo::new(connect(addr).await);
    let (mut sender, connection) = http1::handshake(stream).await.expect("HTTP");
    let connection = tokio::spawn(async move { drop(connection.await) });
    let response = sender.send_request(post(path, body.to_string())).await;
    let response = response.expect("an answer");
    Reading {
        status: response.status().as_u16(),
        body: response.into_body(),
        connection,
        sender,
    }
}

/// Asks until the answer is as wanted.
pub async fn until(addr: SocketAddr, path: &str, wanted: impl Fn(&Answered) -> bool) -> Answered {
    let ask = async {
        loop {
            let answered = send(addr, get(path)).await;
            if wanted(&answered) {
                return answered;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    match tokio::time::timeout(PATIENCE, ask).await {
        Ok(answered) => answered,
        Err(_) => {
            let last = send(addr, get(path)).await;
            panic!("{path} never became as wanted: {last:?}")
        }
    }
}

async fn connect(addr: SocketAddr) -> TcpStream {
    TcpStream::connect(addr).await.expect("the server listens")
}

async fn whole(response: Response<Incoming>) -> Answered {
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("a whole body").to_bytes();
    Answered {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    }
}
