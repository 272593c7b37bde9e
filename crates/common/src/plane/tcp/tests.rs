//! What is said in frames: peers that no [`Client`] is.

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::frame;
use crate::{
    plane::{
        Client, ClientConfig, delta,
        tests::{Plane, Seen, last, request, tokens},
    },
    proto::worker::{Delta, FinishReason},
};

#[tokio::test]
async fn another_major_version_is_refused_with_both_versions() {
    let worker = Plane::Tcp.worker(|_| {});
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_introduction(
        &mut hello,
        frame::Kind::Hello,
        (2, 3),
        &crate::proto::plane::Hello::default(),
    );
    socket.write_all(&hello).await.unwrap();
    let mut answer = BytesMut::new();
    while socket.read_buf(&mut answer).await.unwrap() != 0 {}
    let header = frame::peek(&answer, frame::MAX_FRAME).unwrap().unwrap();
    assert_eq!(header.kind, Some(frame::Kind::Reject));
    let payload = frame::take(&mut answer, header);
    let peer = frame::introduction(&payload).unwrap();
    let error: crate::proto::worker::Error =
        frame::message(frame::Kind::Reject, peer.message).unwrap();
    assert_eq!(error.code(), crate::proto::worker::Code::Incompatible);
    assert!(error.message.contains("1.1"), "{}", error.message);
    assert!(error.message.contains("2.3"), "{}", error.message);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_falls_silent_is_given_up() {
    // Accepts, and after the Welcome says nothing more.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let silent = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut welcome = BytesMut::new();
        frame::put_welcome(&mut welcome, &crate::proto::plane::Welcome::default());
        socket.write_all(&welcome).await.unwrap();
        let mut buf = BytesMut::new();
        while socket.read_buf(&mut buf).await.is_ok_and(|n| n > 0) {}
    });
    let client = Client::connect(address, ClientConfig::default());
    client.ready().await.unwrap();
    let mut stream = client.generate(&request("a")).unwrap();
    let delta = stream.next().await.unwrap();
    let error = delta.error.unwrap();
    assert_eq!(error.code(), crate::proto::worker::Code::Disconnected);
    assert!(error.message.contains("15 s"), "{}", error.message);
    silent.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_processor_is_given_up() {
    let mut worker = Plane::Tcp.worker(|_| {});
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_hello(&mut hello, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut hello, 1, &request("a"));
    socket.write_all(&hello).await.unwrap();
    worker.submitted().await;
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}

#[tokio::test]
async fn a_stream_number_that_does_not_rise_ends_the_connection() {
    let mut worker = Plane::Tcp.worker(|_| {});
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut frames = BytesMut::new();
    frame::put_hello(&mut frames, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut frames, 5, &request("a"));
    frame::put_submit(&mut frames, 5, &request("b"));
    socket.write_all(&frames).await.unwrap();
    worker.submitted().await;
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}

#[tokio::test]
async fn a_processor_that_does_not_read_costs_one_delta_per_stream() {
    let mut worker = Plane::Tcp.worker(|_| {});
    // A peer that submits two requests and then reads nothing.
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_hello(&mut hello, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut hello, 1, &request("a"));
    frame::put_submit(&mut hello, 2, &request("b"));
    socket.write_all(&hello).await.unwrap();
    let (connection, ..) = worker.submitted().await;
    worker.submitted().await;
    // More than both socket buffers hold, and far less in one merged delta's allocation.
    let steps = 20_000_u32;
    for n in 0..steps {
        connection.send(&mut vec![tokens(1, vec![n; 100]), tokens(2, [n])], None);
    }
    assert!(connection.waiting_streams() <= 2);
    connection.send(
        &mut vec![last(1, FinishReason::Stop), last(2, FinishReason::Stop)],
        None,
    );
    // It reads after all, and nothing is missing.
    let mut buf = BytesMut::new();
    let mut got = [Delta::default(), Delta::default()];
    while got.iter().any(|delta| !delta::is_last(delta)) {
        while let Some(header) = frame::peek(&buf, frame::MAX_FRAME).unwrap() {
            let payload = frame::take(&mut buf, header);
            if header.kind == Some(frame::Kind::Step) {
                let step: crate::proto::worker::StepDeltas =
                    frame::message(frame::Kind::Step, payload).unwrap();
                for delta in step.deltas {
                    let at = delta.stream as usize - 1;
                    delta::merge(&mut got[at], delta);
                }
            }
        }
        if got.iter().all(delta::is_last) {
            break;
        }
        assert_ne!(socket.read_buf(&mut buf).await.unwrap(), 0);
    }
    assert_eq!(got[0].tokens.len(), steps as usize * 100);
    assert_eq!(got[1].tokens, (0..steps).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_processor_that_never_reads_again_is_cut_off_at_the_limit() {
    let mut worker = Plane::Tcp.worker(|config| config.max_backlog = 1 << 20);
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_hello(&mut hello, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut hello, 1, &request("a"));
    socket.write_all(&hello).await.unwrap();
    let (connection, ..) = worker.submitted().await;
    while !connection.is_closed() {
        connection.send(&mut vec![tokens(1, vec![0; 10_000])], None);
    }
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}
