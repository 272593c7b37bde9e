//! What a processor asks of a worker, and how it hears the whole answer.

use stator_common::Card;
use stator_common::discovery::{Event, Watch};
use stator_common::plane::{Client, DeltaStream, delta};
use stator_common::proto::worker::{Delta, GenerateRequest, Sampling};

use crate::wait::until;

/// Returns a greedy request for exactly `max_tokens` tokens.
pub fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> GenerateRequest {
    let prompt: Vec<u8> = prompt.into_iter().flat_map(u32::to_le_bytes).collect();
    GenerateRequest {
        request_id: "test".to_owned(),
        prompt_tokens: prompt.into(),
        sampling: Some(Sampling {
            temperature: Some(0.0),
            max_tokens,
            ignore_eos: true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Submits a request; what comes of it can be read or dropped.
pub fn submit(client: &Client, request: &GenerateRequest) -> DeltaStream {
    client.generate(request).expect("the worker takes it")
}

/// Reads a stream to its end and returns all of it as one delta.
pub async fn read_to_end(mut stream: DeltaStream) -> Delta {
    let mut all = Delta::default();
    while let Some(delta) = stream.next().await {
        delta::merge(&mut all, delta);
    }
    all
}

/// Submits a request and returns everything that comes of it.
pub async fn outcome(client: &Client, request: &GenerateRequest) -> Delta {
    read_to_end(submit(client, request)).await
}

/// Waits until the worker says that it runs this many requests.
pub async fn until_running(client: &Client, count: u32) {
    until("the load is as wanted", || client.load().running == count).await;
}

/// Returns the card that is published next.
///
/// # Panics
/// If a worker leaves first.
pub async fn card(watch: &mut Watch) -> Card {
    match watch.next().await {
        Some(Event::Put(card)) => *card,
        other => panic!("expected a worker, got {other:?}"),
    }
}
