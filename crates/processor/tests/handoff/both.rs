//! Hand-offs whose engines find each other by an id that the processor gives: both legs begin together.

use stator_common::Code;
use stator_common::card::{HandOffProtocol, Role};
use stator_common::plane::tcp::delta::failed;
use stator_common::proto::worker::Leg;
use stator_processor::config::Config;

use crate::stage::{Played, Stage, answer, handed};

async fn pushing() -> (Stage, Played, Played) {
    let mut stage = Stage::new(Config::default()).await;
    let change = |peers: &[&str]| {
        let peers = peers.iter().map(|&peer| peer.to_owned()).collect();
        move |card: &mut stator_common::Card| {
            let handoff = card.handoff.as_mut().expect("the stage gives one");
            handoff.connector = "NixlPushConnector".to_owned();
            handoff.protocol = HandOffProtocol::RouterAllocated;
            handoff.peers = peers;
        }
    };
    let prefill = stage.add_with("p0", Role::Prefill, change(&["6b76"])).await;
    let decode = stage.add_with("d0", Role::Decode, change(&[])).await;
    (stage, prefill, decode)
}

#[tokio::test]
async fn both_legs_begin_together_and_share_an_id() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    // Decode comes although prefill has not answered.
    let second = decode.attempt().await;
    let first = prefill.attempt().await;
    assert_eq!(first.request.leg(), Leg::Prefill);
    assert_eq!(second.request.leg(), Leg::Decode);
    assert!(!first.request.transfer_id.is_empty());
    assert_eq!(second.request.transfer_id, first.request.transfer_id);
    assert_eq!(second.request.kv_transfer_params, "kv");
    first.send(handed("unused"));
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().json()["choices"][0]["text"], "yes");
}

#[tokio::test]
async fn the_failure_of_one_leg_ends_the_other() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let (first, second) = (prefill.attempt().await, decode.attempt().await);
    first.send(failed(0, Code::EngineDead, "the engine died"));
    assert_eq!(decode.cancelled().await, second.stream);
    // Again, under another id.
    let (again, at_decode) = (prefill.attempt().await, decode.attempt().await);
    assert_ne!(again.request.transfer_id, first.request.transfer_id);
    again.send(handed("unused"));
    answer(&at_decode, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_ends_both_legs() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let (first, second) = (prefill.attempt().await, decode.attempt().await);
    asked.abort();
    assert_eq!(prefill.cancelled().await, first.stream);
    assert_eq!(decode.cancelled().await, second.stream);
}
