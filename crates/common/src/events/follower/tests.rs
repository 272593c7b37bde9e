use std::time::Duration;

use prost::Message;
use tokio::time::timeout;

use super::*;
use crate::{
    events::{
        plane::{Outlet as _, Question},
        view::Medium,
        zmq::Outlet,
    },
    nats::Nats,
    proto::kv,
};

/// A relay that says what the test says.
struct Relay {
    outlet: Outlet,
}

fn view() -> ViewId {
    ViewId {
        worker: WorkerId("w".to_owned()),
        dp_rank: 0,
    }
}

fn stored(hash: u64) -> Change {
    Change::Stored(Blocks {
        medium: Medium::Gpu,
        hashes: vec![hash],
    })
}

impl Relay {
    async fn new() -> Self {
        let outlet = Outlet::bind([127, 0, 0, 1].into(), 0).await.unwrap();
        Self { outlet }
    }

    async fn question(&mut self) -> (Question, kv::SnapshotPart) {
        let question = self.outlet.asked().await.unwrap();
        let request = kv::SnapshotRequest::decode(question.question.clone()).unwrap();
        let part = kv::SnapshotPart {
            worker: request.worker,
            dp_rank: request.dp_rank,
            number: request.number,
            ..kv::SnapshotPart::default()
        };
        (question, part)
    }

    async fn answer(&mut self, epoch: u64, seq: u64) {
        let (question, part) = self.question().await;
        let part = kv::SnapshotPart {
            epoch,
            seq,
            last: true,
            ..part
        };
        let bytes = part.encode_to_vec().into();
        self.outlet.answer(&question.asker, bytes).await;
    }

    async fn publish(&mut self, epoch: u64, seq: u64, change: Option<Change>) {
        let batch = kv::Batch {
            worker: view().worker.0,
            dp_rank: 0,
            epoch,
            seq,
            changes: change.iter().map(Change::to_proto).collect(),
        };
        let bytes = batch.encode_to_vec().into();
        self.outlet.publish(&view().topic(), bytes).await;
    }
}

fn follow(relay: &Relay, patience: Patience) -> (Follower, Events) {
    let (follower, events) = Follower::new(patience, Nats::default());
    let at = relay.outlet.ports().advertised("127.0.0.1");
    follower.follow(&view().worker, 1, &at);
    (follower, events)
}

async fn next(events: &mut Events) -> Update {
    let event = timeout(Duration::from_secs(60), events.next()).await;
    let event = event.expect("in time").expect("a follower");
    assert_eq!(event.view, view());
    event.update
}

fn reset(epoch: u64) -> Update {
    Update::Reset {
        epoch,
        blocks: Vec::new(),
    }
}

#[tokio::test]
async fn a_hole_found_by_a_heartbeat_is_made_up_for() {
    let mut relay = Relay::new().await;
    let (_follower, mut events) = follow(&relay, Patience::default());
    relay.answer(1, 4).await;
    assert_eq!(next(&mut events).await, reset(1));
    // A subscription takes its time to arrive.
    relay.publish(1, 5, Some(stored(5))).await;
    loop {
        relay.publish(1, 6, None).await;
        let asked = timeout(Duration::from_millis(20), relay.question()).await;
        let Ok((question, part)) = asked else {
            continue;
        };
        let part = kv::SnapshotPart {
            epoch: 1,
            seq: 6,
            last: true,
            ..part
        };
        let bytes = part.encode_to_vec().into();
        relay.outlet.answer(&question.asker, bytes).await;
        break;
    }
    let mut update = next(&mut events).await;
    if update == Update::Changed(stored(5)) {
        update = next(&mut events).await;
    }
    assert_eq!(update, reset(1));
    relay.publish(1, 7, Some(stored(7))).await;
    assert_eq!(next(&mut events).await, Update::Changed(stored(7)));
}

#[tokio::test]
async fn a_view_that_the_relay_does_not_know_yet_is_asked_for_again() {
    let mut relay = Relay::new().await;
    let (_follower, mut events) = follow(&relay, Patience::default());
    let (question, part) = relay.question().await;
    let unknown = kv::SnapshotPart {
        unknown: true,
        ..part
    };
    let bytes = unknown.encode_to_vec().into();
    relay.outlet.answer(&question.asker, bytes).await;
    relay.answer(3, 0).await;
    assert_eq!(next(&mut events).await, reset(3));
}

#[tokio::test]
async fn silence_and_being_forgotten_end_in_lost_and_only_what_was_told_is_lost() {
    let mut relay = Relay::new().await;
    let silence = Duration::from_millis(300);
    let (follower, mut events) = follow(
        &relay,
        Patience {
            silence,
            ..Patience::default()
        },
    );
    relay.answer(1, 0).await;
    assert_eq!(next(&mut events).await, reset(1));
    assert_eq!(next(&mut events).await, Update::Lost);
    // It is asked again, and comes back.
    relay.answer(1, 0).await;
    assert_eq!(next(&mut events).await, reset(1));
    follower.forget(&view().worker);
    assert_eq!(next(&mut events).await, Update::Lost);
    drop(follower);
    assert!(events.next().await.is_none());
}
