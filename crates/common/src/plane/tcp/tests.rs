//! Both ends in one process, over real sockets.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use super::*;
use crate::{
    drain::{self, Trigger},
    ids::WorkerId,
    proto::worker::{Delta, FinishReason, GenerateRequest, Load},
};

/// What a test's worker saw.
enum Seen {
    Submit(Arc<Connection>, u32, Box<GenerateRequest>),
    Cancel(u32),
    Closed,
}

struct Probe {
    seen: mpsc::UnboundedSender<Seen>,
    blobs: Mutex<HashMap<BlobHash, Bytes>>,
}

impl Handler for Probe {
    fn submit(&self, connection: &Arc<Connection>, stream: u32, request: GenerateRequest) {
        let _ = self
            .seen
            .send(Seen::Submit(connection.clone(), stream, Box::new(request)));
    }

    fn cancel(&self, _: &Arc<Connection>, stream: u32) {
        let _ = self.seen.send(Seen::Cancel(stream));
    }

    fn closed(&self, _: &Arc<Connection>) {
        let _ = self.seen.send(Seen::Closed);
    }

    fn blob(&self, hash: &BlobHash) -> Option<Bytes> {
        self.blobs.lock().get(hash).cloned()
    }
}

struct Worker {
    address: String,
    seen: mpsc::UnboundedReceiver<Seen>,
    probe: Arc<Probe>,
    trigger: Trigger,
    handle: ServerHandle,
}

fn worker(change: impl FnOnce(&mut ServerConfig)) -> Worker {
    worker_at("127.0.0.1:0", change)
}

fn worker_at(address: &str, change: impl FnOnce(&mut ServerConfig)) -> Worker {
    let mut config = ServerConfig::new(WorkerId("w".to_owned()));
    change(&mut config);
    let server = Server::bind(address.parse().unwrap(), config).unwrap();
    let address = server.local_addr().unwrap().to_string();
    let (sender, seen) = mpsc::unbounded_channel();
    let probe = Arc::new(Probe {
        seen: sender,
        blobs: Mutex::default(),
    });
    let (trigger, drain) = drain::channel();
    let handle = server.spawn(probe.clone(), drain);
    Worker {
        address,
        seen,
        probe,
        trigger,
        handle,
    }
}

impl Worker {
    async fn client(&self) -> Client {
        let client = Client::connect(&self.address, ClientConfig::default());
        client.ready().await.unwrap();
        client
    }

    async fn submitted(&mut self) -> (Arc<Connection>, u32, GenerateRequest) {
        match self.seen.recv().await {
            Some(Seen::Submit(connection, stream, request)) => (connection, stream, *request),
            _ => panic!("expected a submit"),
        }
    }
}

fn request(id: &str) -> GenerateRequest {
    GenerateRequest {
        request_id: id.to_owned(),
        prompt_tokens: Bytes::from_static(&[1, 0, 0, 0]),
        ..GenerateRequest::default()
    }
}

fn tokens(stream: u32, tokens: impl Into<Vec<u32>>) -> Delta {
    Delta {
        stream,
        tokens: tokens.into(),
        ..Delta::default()
    }
}

fn last(stream: u32, finish: FinishReason) -> Delta {
    Delta {
        stream,
        finish: finish.into(),
        ..Delta::default()
    }
}

async fn read_to_end(stream: &mut DeltaStream) -> Delta {
    let mut all = Delta::default();
    while let Some(delta) = stream.next().await {
        delta::merge(&mut all, delta);
    }
    all
}

#[tokio::test]
async fn many_streams_interleave_on_one_connection() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut streams = Vec::new();
    for n in 0..100 {
        let stream = client.generate(&request(&n.to_string())).unwrap();
        let (connection, number, request) = worker.submitted().await;
        assert_eq!(request.request_id, n.to_string());
        streams.push((stream, connection, number));
    }
    let connection = streams[0].1.clone();
    for step in 0..50 {
        let mut deltas = streams
            .iter()
            .map(|(_, _, number)| tokens(*number, [*number * 1000 + step]))
            .collect();
        connection.send(&mut deltas, None);
    }
    let mut deltas = streams
        .iter()
        .map(|(_, _, number)| last(*number, FinishReason::Length))
        .collect();
    connection.send(&mut deltas, None);
    for (mut stream, _, number) in streams {
        let all = read_to_end(&mut stream).await;
        let expected: Vec<u32> = (0..50).map(|step| number * 1000 + step).collect();
        assert_eq!(all.tokens, expected);
        assert_eq!(all.finish(), FinishReason::Length);
    }
    assert_eq!(client.in_flight(), 0);
}

#[tokio::test]
async fn a_dropped_stream_is_cancelled_and_a_finished_one_is_not() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut finished = client.generate(&request("finished")).unwrap();
    let (connection, first, _) = worker.submitted().await;
    let dropped = client.generate(&request("dropped")).unwrap();
    let (_, second, _) = worker.submitted().await;
    connection.send(&mut vec![last(first, FinishReason::Stop)], None);
    assert!(finished.next().await.is_some());
    drop(finished);
    drop(dropped);
    match worker.seen.recv().await {
        Some(Seen::Cancel(stream)) => assert_eq!(stream, second),
        _ => panic!("expected a cancel"),
    }
}

#[tokio::test]
async fn a_slow_reader_gets_merged_deltas_and_others_go_on() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut slow = client.generate(&request("slow")).unwrap();
    let (connection, slow_number, _) = worker.submitted().await;
    let mut quick = client.generate(&request("quick")).unwrap();
    let (_, quick_number, _) = worker.submitted().await;
    for n in 0..1000 {
        connection.send(&mut vec![tokens(slow_number, [n])], None);
    }
    connection.send(&mut vec![tokens(quick_number, [7])], None);
    assert_eq!(quick.next().await.unwrap().tokens, [7]);
    let delta = slow.next().await.unwrap();
    assert_eq!(delta.tokens, (0..1000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_processor_that_does_not_read_costs_one_delta_per_stream() {
    let mut worker = worker(|_| {});
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
    let mut worker = worker(|config| config.max_backlog = 1 << 20);
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

#[tokio::test]
async fn a_reader_that_never_reads_loses_its_stream_only() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut stuck = client.generate(&request("stuck")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    let cancelled = loop {
        connection.send(&mut vec![tokens(number, vec![0; 100_000])], None);
        tokio::task::yield_now().await;
        if let Ok(Seen::Cancel(stream)) = worker.seen.try_recv() {
            break stream;
        }
    };
    assert_eq!(cancelled, number);
    let delta = stuck.next().await.unwrap();
    assert_eq!(
        delta.error.unwrap().code(),
        crate::proto::worker::Code::Overloaded
    );
    assert!(stuck.next().await.is_none());
}

#[tokio::test]
async fn a_lost_worker_ends_its_streams_and_a_new_one_is_found() {
    let mut first = worker(|_| {});
    let client = first.client().await;
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = first.submitted().await;
    connection.send(&mut vec![tokens(number, [5])], None);
    assert_eq!(stream.next().await.unwrap().tokens, [5]);
    first.handle.close().await;
    let delta = stream.next().await.unwrap();
    assert_eq!(delta.finish(), FinishReason::Error);
    let error = delta.error.unwrap();
    assert_eq!(error.code(), crate::proto::worker::Code::Disconnected);
    assert!(stream.next().await.is_none());

    let mut state = client.state();
    state
        .wait_for(|state| matches!(state, State::Connecting { .. }))
        .await
        .unwrap();
    let refused = client.generate(&request("b")).err().unwrap();
    assert_eq!(refused.code(), Code::Unavailable);

    let mut second = worker_at(&first.address, |_| {});
    client.ready().await.unwrap();
    let _stream = client.generate(&request("c")).unwrap();
    let (_, _, request) = second.submitted().await;
    assert_eq!(request.request_id, "c");
}

#[tokio::test]
async fn a_processor_is_gone_with_its_last_stream_and_not_before() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    drop(client);
    connection.send(&mut vec![tokens(number, [5])], None);
    assert_eq!(stream.next().await.unwrap().tokens, [5]);
    assert!(!connection.is_closed());
    drop(stream);
    assert!(matches!(worker.seen.recv().await, Some(Seen::Cancel(_))));
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}

#[tokio::test]
async fn another_major_version_is_refused_with_both_versions() {
    let worker = worker(|_| {});
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
    assert!(error.message.contains("1.0"), "{}", error.message);
    assert!(error.message.contains("2.3"), "{}", error.message);
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_the_right_one_is_not() {
    let worker = worker(|config| config.token = Some("secret".to_owned()));
    for (token, welcome) in [
        (None, false),
        (Some("secreT"), false),
        (Some("secret"), true),
    ] {
        let client = Client::connect(
            &worker.address,
            ClientConfig {
                token: token.map(str::to_owned),
                ..ClientConfig::default()
            },
        );
        match client.ready().await {
            Ok(()) => assert!(welcome),
            Err(error) => {
                assert!(!welcome);
                assert_eq!(error.code(), Code::Unauthenticated);
                assert!(!error.to_string().contains("secret"));
            }
        }
    }
}

#[tokio::test]
async fn another_worker_at_the_same_address_is_not_mistaken() {
    let worker = worker(|_| {});
    let client = Client::connect(
        &worker.address,
        ClientConfig {
            worker: Some(WorkerId("other".to_owned())),
            ..ClientConfig::default()
        },
    );
    assert_eq!(client.ready().await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn blobs_come_by_their_hash_between_the_tokens() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let big = Bytes::from(vec![7; 5 << 20]);
    let empty = Bytes::new();
    for blob in [&big, &empty] {
        worker
            .probe
            .blobs
            .lock()
            .insert(BlobHash::of(blob), blob.clone());
    }
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    let big_hash = BlobHash::of(&big);
    let (blob, all) = tokio::join!(client.blob(&big_hash), async {
        for n in 0..100 {
            connection.send(&mut vec![tokens(number, [n])], None);
            tokio::task::yield_now().await;
        }
        connection.send(&mut vec![last(number, FinishReason::Stop)], None);
        read_to_end(&mut stream).await
    });
    assert_eq!(blob.unwrap(), big);
    assert_eq!(all.tokens, (0..100).collect::<Vec<_>>());
    assert_eq!(client.blob(&BlobHash::of(&empty)).await.unwrap(), empty);
    let missing = client.blob(&BlobHash("00".to_owned())).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test]
async fn other_bytes_under_a_hash_are_refused() {
    let worker = worker(|_| {});
    let client = worker.client().await;
    let hash = BlobHash::of(b"right");
    worker
        .probe
        .blobs
        .lock()
        .insert(hash.clone(), Bytes::from_static(b"wrong"));
    let error = client.blob(&hash).await.unwrap_err();
    assert!(matches!(error, PlaneError::WrongBlob { .. }));
}

#[tokio::test]
async fn a_draining_worker_says_so_and_finishes_what_runs() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    worker.trigger.drain();
    client
        .state()
        .wait_for(|state| matches!(state, State::Draining))
        .await
        .unwrap();
    let refused = client.generate(&request("b")).err().unwrap();
    assert_eq!(refused.code(), Code::Draining);
    let mut deltas = vec![Delta {
        tokens: vec![9],
        ..last(number, FinishReason::Stop)
    }];
    connection.send(&mut deltas, None);
    worker.handle.close().await;
    // Closing flushes: the last delta arrives, not a disconnect.
    let delta = stream.next().await.unwrap();
    assert_eq!(delta.tokens, [9]);
    assert_eq!(delta.finish(), FinishReason::Stop);
}

#[tokio::test]
async fn the_latest_load_is_known() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    let load = Load {
        running: 3,
        waiting: 2,
        kv_usage: 0.5,
    };
    connection.send_load(load);
    connection.send(&mut vec![last(number, FinishReason::Stop)], None);
    stream.next().await.unwrap();
    assert_eq!(client.load(), load);
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
    let mut worker = worker(|_| {});
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
    let mut worker = worker(|_| {});
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
async fn a_large_prompt_arrives_whole() {
    let mut worker = worker(|_| {});
    let client = worker.client().await;
    let prompt = Bytes::from(vec![3; 4 << 20]);
    let _stream = client
        .generate(&GenerateRequest {
            prompt_tokens: prompt.clone(),
            ..request("long")
        })
        .unwrap();
    let (_, _, request) = worker.submitted().await;
    assert_eq!(request.prompt_tokens, prompt);
}

#[tokio::test]
async fn a_processor_that_stops_waiting_for_a_worker_leaves_no_task() {
    let client = Client::connect("127.0.0.1:1", ClientConfig::default());
    let mut state = client.state();
    drop(client);
    // The sender goes with the client.
    tokio::time::timeout(Duration::from_secs(60), async {
        while state.changed().await.is_ok() {}
    })
    .await
    .unwrap();
}
