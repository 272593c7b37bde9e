//! What any client of gRPC finds on the http plane.

use std::time::Duration;

use futures::StreamExt;
use tonic::{Request, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::*;
use crate::{
    plane::error,
    proto::worker::{self, BlobRequest, worker_client::WorkerClient},
};

async fn channel(worker: &Worker) -> Channel {
    let endpoint = Channel::from_shared(worker.address.clone()).unwrap();
    endpoint.connect().await.unwrap()
}

#[tokio::test]
async fn a_stranger_generates_and_cancels_by_dropping_the_call() {
    let mut worker = Plane::Http.worker(|_| {});
    let mut client = WorkerClient::new(channel(&worker).await);
    let mut deltas = client.generate(request("a")).await.unwrap().into_inner();
    let (connection, stream, _) = worker.submitted().await;
    connection.send(&mut vec![tokens(stream, [5])], None);
    let delta = deltas.message().await.unwrap().unwrap();
    assert_eq!((delta.stream, delta.tokens), (0, vec![5]));
    drop(deltas);
    assert!(matches!(worker.seen.recv().await, Some(Seen::Cancel(number)) if number == stream));

    let mut deltas = client.generate(request("b")).await.unwrap().into_inner();
    let (_, stream, _) = worker.submitted().await;
    connection.send(&mut vec![last(stream, FinishReason::Stop)], None);
    assert_eq!(
        deltas.next().await.unwrap().unwrap().finish(),
        FinishReason::Stop
    );
    assert!(deltas.next().await.is_none());
}

#[tokio::test]
async fn errors_are_statuses_after_what_was_generated() {
    let mut worker = Plane::Http.worker(|_| {});
    let mut client = WorkerClient::new(channel(&worker).await);
    for (code, status) in [
        (Code::InvalidRequest, tonic::Code::InvalidArgument),
        (Code::Draining, tonic::Code::Unavailable),
        (Code::HandoffFailed, tonic::Code::Aborted),
        (Code::DeadlineExceeded, tonic::Code::DeadlineExceeded),
    ] {
        let mut deltas = client.generate(request("a")).await.unwrap().into_inner();
        let (connection, stream, _) = worker.submitted().await;
        connection.send(&mut vec![tokens(stream, [5])], None);
        connection.fail(stream, code, "because");
        assert_eq!(deltas.next().await.unwrap().unwrap().tokens, [5]);
        let error = deltas.next().await.unwrap().unwrap_err();
        assert_eq!((error.code(), error.message()), (status, "because"));
    }
    let hash = "00".to_owned();
    let missing = client.blob(BlobRequest { hash }).await.unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn a_refusal_is_the_answer_to_the_call_and_whole_for_processors() {
    let worker = Plane::Http.worker_with(|connection, stream, _| {
        let mut refusal = last(stream, FinishReason::Error);
        refusal.error = Some(worker::Error {
            field: "max_tokens".to_owned(),
            untouched: true,
            ..error(Code::InvalidRequest, "too many")
        });
        connection.send(&mut vec![refusal], None);
    });
    let mut client = WorkerClient::new(channel(&worker).await);
    let refused = client.generate(request("a")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert_eq!(refused.message(), "too many");

    let mut stream = worker.client().await.generate(&request("b")).unwrap();
    let error = stream.next().await.unwrap().error.unwrap();
    assert_eq!((&*error.field, error.untouched), ("max_tokens", true));
}

#[tokio::test]
async fn a_deadline_of_grpc_becomes_the_requests_own() {
    let mut worker = Plane::Http.worker(|_| {});
    let mut client = WorkerClient::new(channel(&worker).await);
    let mut open = Vec::new();
    for (own, within, expected) in [
        (None, 5_000, 5_000),
        (Some(100), 5_000, 100),
        (Some(9_000), 5_000, 5_000),
    ] {
        let mut request = Request::new(GenerateRequest {
            deadline_ms: own,
            ..request("a")
        });
        request.set_timeout(Duration::from_millis(within));
        open.push(client.generate(request).await.unwrap());
        let (_, _, request) = worker.submitted().await;
        assert_eq!(request.deadline_ms, Some(expected));
    }
}

#[tokio::test]
async fn health_says_whether_requests_are_taken_and_reflection_what_can_be_asked() {
    let worker = Plane::Http.worker(|config| config.token = Some("secret".to_owned()));
    let channel = channel(&worker).await;
    let mut health = HealthClient::new(channel.clone());
    let service = "stator.worker.v1.Worker".to_owned();
    let mut watch = health
        .watch(HealthCheckRequest {
            service: service.clone(),
        })
        .await
        .unwrap()
        .into_inner();
    let mut until = async |wanted: ServingStatus| {
        while watch.next().await.unwrap().unwrap().status() != wanted {}
    };
    until(ServingStatus::Serving).await;
    worker.trigger.drain();
    until(ServingStatus::NotServing).await;

    let asked = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(service)),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(futures::stream::iter([asked]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    assert!(matches!(
        answer,
        Some(MessageResponse::FileDescriptorResponse(_))
    ));
}

#[tokio::test]
async fn a_stranger_may_watch_health_on_a_few_streams_and_all_strangers_on_a_few_more() {
    let worker = Plane::Http.worker(|_| {});
    let ask = HealthCheckRequest::default();
    // As many of a connection as may be, and the refusal of the next.
    let connect = async || {
        let mut health = HealthClient::new(channel(&worker).await);
        let mut open = Vec::new();
        let refused = loop {
            match health.watch(ask.clone()).await {
                Ok(watch) => open.push(watch.into_inner()),
                Err(refused) => break refused,
            }
        };
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        (health, open, refused)
    };
    let (mut health, mut open, refused) = connect().await;
    assert_eq!(open.len(), 16);
    assert!(refused.message().contains("connection's"), "{refused}");
    // One that is given up makes room for another.
    open.pop();
    let again = async {
        loop {
            match health.watch(ask.clone()).await {
                Ok(watch) => break watch,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let again = again.await;
    let mut others = Vec::new();
    for _ in 1..16 {
        others.push(connect().await);
    }
    let (mut late, none, refused) = connect().await;
    assert_eq!(none.len(), 0);
    assert!(refused.message().contains("worker's"), "{refused}");
    // Whoever only asks is answered, and processors are not strangers.
    let answer = late.check(ask.clone()).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    worker.client().await;
    drop(again);
}

#[tokio::test]
async fn a_caller_of_another_version_or_without_the_token_is_refused() {
    let worker = Plane::Http.worker(|config| config.token = Some("secret".to_owned()));
    let mut client = WorkerClient::new(channel(&worker).await);
    let call = |key: &'static str, value: &str| {
        let mut request = Request::new(request("a"));
        request.metadata_mut().insert(key, value.parse().unwrap());
        request
    };
    let version = client.generate(call("stator-plane-version", "2.3")).await;
    let version = version.unwrap_err();
    assert_eq!(version.code(), tonic::Code::FailedPrecondition);
    assert!(version.message().contains("1.0") && version.message().contains("2.3"));
    for token in ["Bearer other", "secret"] {
        let refused = client
            .generate(call("authorization", token))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        assert!(!refused.message().contains("secret"));
    }
    client
        .generate(call("authorization", "Bearer secret"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_that_is_too_large_for_the_worker_is_refused_alone() {
    let worker = Plane::Http.worker(|config| config.max_frame = 1 << 20);
    let client = worker.client().await;
    let large = GenerateRequest {
        prompt_tokens: Bytes::from(vec![3; 4 << 20]),
        ..request("large")
    };
    let mut stream = client.generate(&large).unwrap();
    let error = stream.next().await.unwrap().error.unwrap();
    assert_eq!(error.code(), worker::Code::TooLarge);
    assert!(matches!(*client.state().borrow(), State::Ready));
}

#[tokio::test]
async fn a_caller_that_does_not_read_costs_one_delta_and_then_loses_its_call() {
    let mut worker = Plane::Http.worker(|_| {});
    let channel = channel(&worker).await;
    let mut client = WorkerClient::new(channel).max_decoding_message_size(64 << 20);
    let mut stuck = client
        .generate(request("stuck"))
        .await
        .unwrap()
        .into_inner();
    let (connection, number, _) = worker.submitted().await;
    let cancelled = loop {
        connection.send(&mut vec![tokens(number, vec![0; 100_000])], None);
        assert!(connection.waiting_streams() <= 1);
        tokio::task::yield_now().await;
        if let Ok(Seen::Cancel(stream)) = worker.seen.try_recv() {
            break stream;
        }
    };
    assert_eq!(cancelled, number);
    let mut other = client
        .generate(request("other"))
        .await
        .unwrap()
        .into_inner();
    let (_, number, _) = worker.submitted().await;
    connection.send(&mut vec![tokens(number, [5])], None);
    assert_eq!(other.next().await.unwrap().unwrap().tokens, [5]);
    let error = loop {
        if let Err(error) = stuck.next().await.unwrap() {
            break error;
        }
    };
    assert_eq!(error.code(), tonic::Code::ResourceExhausted);
}

#[tokio::test]
async fn a_session_with_too_much_to_read_is_ended() {
    let mut worker = Plane::Http.worker(|config| config.max_backlog = 1 << 20);
    let mut client = WorkerClient::new(channel(&worker).await);
    let _watch = client.watch(worker::WatchRequest::default()).await.unwrap();
    let _stuck = client.generate(request("stuck")).await.unwrap();
    let (connection, number, _) = worker.submitted().await;
    while !connection.is_closed() {
        connection.send(&mut vec![tokens(number, vec![0; 10_000])], None);
        tokio::task::yield_now().await;
    }
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}

#[tokio::test]
async fn a_worker_that_falls_silent_is_given_up() {
    let mut worker = Plane::Http.worker(|config| config.beat_every = Duration::from_secs(3600));
    let config = ClientConfig {
        dead_after: Duration::from_millis(300),
        ..ClientConfig::default()
    };
    let client = Client::connect(&worker.address, config);
    client.ready().await.unwrap();
    let mut stream = client.generate(&request("a")).unwrap();
    let delta = stream.next().await.unwrap();
    let error = delta.error.unwrap();
    assert_eq!(error.code(), worker::Code::Disconnected);
    assert!(error.message.contains("not heard of"), "{}", error.message);
    // Its requests end at the worker, too.
    while !matches!(worker.seen.recv().await, Some(Seen::Closed)) {}
}
