//! How long a connection may take for what, and how it ends.

use std::net::SocketAddr;
use std::time::Duration;

use stator_processor::config::Config;
use stator_testkit::http::{get, send, send_h2_on, until};
use stator_testkit::worker::Worker;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::answers::{completion, silent, tokens};
use crate::support::{start, until_open};

/// Sends bytes and returns everything that comes back until the other side closes.
pub(crate) async fn raw(addr: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is as good as an end.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

fn hasty() -> Config {
    let soon = Duration::from_millis(50);
    Config {
        header_timeout: soon,
        ..Config::default()
    }
}

#[tokio::test]
async fn a_client_that_never_finishes_its_header_is_let_go() {
    let processor = start(hasty()).await;
    assert_eq!(raw(processor.addr, "").await, "");
    assert_eq!(raw(processor.addr, "GET /live HT").await, "");
    let mut stream = TcpStream::connect(processor.addr).await.unwrap();
    stream
        .write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer).await.unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 200"));
    stream.write_all(b"GET /li").await.unwrap();
    assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_busy_one_is_not() {
    let soon = Duration::from_millis(50);
    let processor = start(Config {
        idle_timeout: soon,
        header_timeout: soon,
        ..Config::default()
    })
    .await;
    let worker = Worker::start(&processor.discovery, "w", silent()).await;
    until_open(processor.addr, 1).await;
    let closed = raw(processor.addr, "GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(closed.starts_with("HTTP/1.1 200"), "{closed}");

    let waiting = tokio::spawn(send(processor.addr, completion()));
    until(processor.addr, "/workers", |_| worker.submitted() == 1).await;
    tokio::time::sleep(soon * 4).await;
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn a_body_that_stops_arriving_is_not_waited_for() {
    let soon = Duration::from_millis(50);
    let processor = start(Config {
        body_timeout: soon,
        ..Config::default()
    })
    .await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{";
    let answer = raw(processor.addr, head).await;
    assert!(
        answer.starts_with("HTTP/1.1 408") && answer.contains("\"code\":408"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_body_that_arrives_byte_by_byte_is_not_waited_for() {
    let processor = start(Config {
        body_timeout: Duration::from_millis(200),
        ..Config::default()
    })
    .await;
    let mut stream = TcpStream::connect(processor.addr).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 10000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let dripping = tokio::spawn(async move {
        while writer.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut answer = [0; 12];
    reader.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    dripping.abort();
}

#[tokio::test]
async fn http2_is_spoken_without_tls_too() {
    let processor = start(Config::default()).await;
    let stream = TcpStream::connect(processor.addr).await.unwrap();
    let request = http::Request::get(format!("http://{}/live", processor.addr));
    let answered = send_h2_on(stream, request.body(Default::default()).unwrap()).await;
    assert_eq!(answered.json()["status"], "live");
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_place_in_the_engine() {
    let processor = start(Config::default()).await;
    let worker = Worker::start(&processor.discovery, "w", silent()).await;
    until_open(processor.addr, 1).await;
    let waiting = tokio::spawn(send(processor.addr, completion()));
    until(processor.addr, "/workers", |_| worker.submitted() == 1).await;
    waiting.abort();
    until(processor.addr, "/workers", |answered| {
        worker.cancelled() == 1
            && answered.json()["models"][0]["targets"][0]["booked"]["requests"] == 0
    })
    .await;
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let processor = start(Config::default()).await;
    let worker = Worker::start(&processor.discovery, "w", silent()).await;
    until_open(processor.addr, 1).await;
    let mut idle = TcpStream::connect(processor.addr).await.unwrap();
    let running = tokio::spawn(send(processor.addr, completion()));
    until(processor.addr, "/workers", |_| worker.submitted() == 1).await;

    processor.trigger.drain();
    // The idle connection is closed, and the port no longer taken.
    assert_eq!(idle.read(&mut [0; 1]).await.unwrap(), 0);
    while TcpStream::connect(processor.addr).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!processor.task.is_finished() && !running.is_finished());

    // The worker ends the request: the answer gets through, then the processor ends.
    worker.stop().await;
    assert_eq!(running.await.unwrap().status, 503);
    processor.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_request_that_outlives_the_grace_period_is_cut_off() {
    let processor = start(Config::default()).await;
    let worker = Worker::start(&processor.discovery, "w", silent()).await;
    until_open(processor.addr, 1).await;
    let stream = TcpStream::connect(processor.addr).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let running = tokio::spawn(async move { sender.send_request(completion()).await });
    until(processor.addr, "/workers", |_| worker.submitted() == 1).await;
    processor.trigger.abort();
    assert!(running.await.unwrap().is_err());
    processor.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn many_requests_share_a_connection() {
    let processor = start(Config::default()).await;
    let worker = Worker::start(&processor.discovery, "w", tokens(&[1])).await;
    until_open(processor.addr, 1).await;
    let stream = TcpStream::connect(processor.addr).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    for _ in 0..20 {
        sender.ready().await.unwrap();
        let response = sender.send_request(completion()).await.unwrap();
        assert_eq!(response.status(), 200);
        http_body_util::BodyExt::collect(response.into_body())
            .await
            .unwrap();
    }
    assert_eq!(worker.submitted(), 20);
    assert_eq!(send(processor.addr, get("/health")).await.status, 200);
}
