//! Who is let in, who is given up, and what the other side learns.

use super::*;

on_every_plane!(
    a_lost_worker_ends_its_streams_and_a_new_one_is_found,
    a_processor_is_gone_with_its_last_stream_and_not_before,
    a_wrong_token_is_refused_and_the_right_one_is_not,
    another_worker_at_the_same_address_is_not_mistaken,
    a_processor_that_stops_waiting_for_a_worker_leaves_no_task,
);

async fn a_lost_worker_ends_its_streams_and_a_new_one_is_found(plane: Plane) {
    let mut first = plane.worker(|_| {});
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

    let mut second = plane.worker_at(&first.address, |_| {});
    client.ready().await.unwrap();
    let _stream = client.generate(&request("c")).unwrap();
    let (_, _, request) = second.submitted().await;
    assert_eq!(request.request_id, "c");
}

async fn a_processor_is_gone_with_its_last_stream_and_not_before(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let client = worker.client().await;
    let mut stream = client.generate(&request("a")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    drop(client);
    connection.send(&mut vec![tokens(number, [5])], None);
    assert_eq!(stream.next().await.unwrap().tokens, [5]);
    assert!(!connection.is_closed());
    drop(stream);
    // The end of the connection may overtake the cancel.
    while !matches!(worker.seen.recv().await, Some(Seen::Closed)) {}
    assert!(connection.is_closed());
}

async fn a_wrong_token_is_refused_and_the_right_one_is_not(plane: Plane) {
    let worker = plane.worker(|config| config.token = Some("secret".to_owned()));
    for (token, welcome) in [
        (None, false),
        (Some("secreT"), false),
        (Some("secret"), true),
    ] {
        let client = Client::connect(
            &worker.address,
            ClientConfig {
                token: token.map(str::to_owned),
                ..plane.client_config()
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

async fn another_worker_at_the_same_address_is_not_mistaken(plane: Plane) {
    let worker = plane.worker(|_| {});
    let client = Client::connect(
        &worker.address,
        ClientConfig {
            worker: Some(WorkerId("other".to_owned())),
            ..plane.client_config()
        },
    );
    assert_eq!(client.ready().await.unwrap_err().code(), Code::NotFound);
}

async fn a_processor_that_stops_waiting_for_a_worker_leaves_no_task(plane: Plane) {
    let client = Client::connect("127.0.0.1:1", plane.client_config());
    let mut state = client.state();
    drop(client);
    // The sender goes with the client.
    tokio::time::timeout(std::time::Duration::from_secs(60), async {
        while state.changed().await.is_ok() {}
    })
    .await
    .unwrap();
}
