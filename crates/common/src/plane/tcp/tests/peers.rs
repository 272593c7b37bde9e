//! Who is let in, who is given up, and what the other side learns.

use super::*;

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
    assert!(error.message.contains("1.1"), "{}", error.message);
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
