//! How requests and their answers travel between two peers that behave.

use super::*;

on_every_plane!(
    many_streams_interleave_on_one_connection,
    a_dropped_stream_is_cancelled_and_a_finished_one_is_not,
    blobs_come_by_their_hash_between_the_tokens,
    other_bytes_under_a_hash_are_refused,
    a_draining_worker_says_so_and_finishes_what_runs,
    the_latest_load_is_known,
    a_large_prompt_arrives_whole,
    kv_that_crosses_a_cancel_is_not_lost,
);

async fn many_streams_interleave_on_one_connection(plane: Plane) {
    let mut worker = plane.worker(|_| {});
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

async fn a_dropped_stream_is_cancelled_and_a_finished_one_is_not(plane: Plane) {
    let mut worker = plane.worker(|_| {});
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

async fn blobs_come_by_their_hash_between_the_tokens(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let client = worker.client().await;
    // As large as tokenizers get.
    let big = Bytes::from(vec![7; 40 << 20]);
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

async fn other_bytes_under_a_hash_are_refused(plane: Plane) {
    let worker = plane.worker(|_| {});
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

async fn a_draining_worker_says_so_and_finishes_what_runs(plane: Plane) {
    let mut worker = plane.worker(|_| {});
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

async fn the_latest_load_is_known(plane: Plane) {
    let mut worker = plane.worker(|_| {});
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
    while client.load() != load {
        tokio::task::yield_now().await;
    }
}

async fn a_large_prompt_arrives_whole(plane: Plane) {
    let mut worker = plane.worker(|_| {});
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

/// A request whose KV is handed on.
fn prefill(id: &str) -> GenerateRequest {
    GenerateRequest {
        leg: Leg::Prefill.into(),
        ..request(id)
    }
}

/// The last delta of a prefill that hands its KV on.
fn handed(stream: u32) -> Delta {
    Delta {
        kv_transfer_params: Bytes::from_static(b"kv"),
        ..last(stream, FinishReason::Length)
    }
}

async fn kv_that_crosses_a_cancel_is_not_lost(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let (unclaimed, mut found) = mpsc::unbounded_channel();
    let config = ClientConfig {
        unclaimed: Arc::new(move |delta: Delta| drop(unclaimed.send(delta))),
        ..plane.client_config()
    };
    let client = Client::connect(&worker.address, config);
    client.ready().await.unwrap();

    // On its way when the stream was dropped.
    let stream = client.generate(&prefill("crossed")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    drop(stream);
    assert!(matches!(worker.seen.recv().await, Some(Seen::Cancel(_))));
    connection.send(&mut vec![handed(number)], None);
    assert_eq!(found.recv().await.unwrap().kv_transfer_params, "kv");

    // Arrived, but not read.
    let stream = client.generate(&prefill("unread")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    connection.send(&mut vec![handed(number)], None);
    while client.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    assert_eq!(found.recv().await.unwrap().kv_transfer_params, "kv");

    // Read: it is the reader's.
    let mut stream = client.generate(&prefill("read")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    connection.send(&mut vec![handed(number)], None);
    stream.next().await.unwrap();
    drop(stream);
    assert!(found.try_recv().is_err());
}
