//! Hand-offs whose engines know them by an id that the processor gives.

use stator_common::Code;
use stator_common::card::{HandOffProtocol, Role};
use stator_common::plane::delta::failed;
use stator_common::proto::worker::{Delta, FinishReason, Leg};
use stator_processor::config::Config;

use crate::stage::{Played, Stage, answer, handed};

async fn pushing() -> (Stage, Played, Played) {
    let mut stage = Stage::new(Config::default()).await;
    let change = |peers: &[&str]| {
        let peers = peers.iter().map(|&peer| peer.to_owned()).collect();
        move |card: &mut stator_common::Card| {
            let handoff = card.handoff.as_mut().expect("the stage gives one");
            handoff.connector = "MooncakeConnector".to_owned();
            handoff.protocol = HandOffProtocol::RouterAllocated;
            handoff.peers = peers;
        }
    };
    let prefill = stage
        .add_with("p0", Role::Prefill, change(&["70656572"]))
        .await;
    let decode = stage.add_with("d0", Role::Decode, change(&[])).await;
    (stage, prefill, decode)
}

#[tokio::test]
async fn both_legs_carry_the_same_id() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let first = prefill.hand_on("kv").await;
    let second = decode.attempt().await;
    assert_eq!(second.request.leg(), Leg::Decode);
    assert!(!first.request.transfer_id.is_empty());
    assert_eq!(second.request.transfer_id, first.request.transfer_id);
    assert_eq!(second.request.kv_transfer_params, "kv");
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().json()["choices"][0]["text"], "yes");
}

#[tokio::test]
async fn an_engine_that_hands_on_without_a_word_is_found_by_its_card() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    prefill.attempt().await.finish(&[1], FinishReason::Length);
    let second = decode.attempt().await;
    assert_eq!(second.request.kv_transfer_params, "peer");
    answer(&second, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn an_id_is_not_used_again() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let first = prefill.hand_on("kv-1").await;
    let broken = decode.attempt().await;
    broken.send(failed(0, Code::HandoffFailed, "nobody pushed"));
    let again = prefill.hand_on("kv-2").await;
    assert_ne!(again.request.transfer_id, first.request.transfer_id);
    answer(&decode.attempt().await, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
}

#[tokio::test]
async fn kv_that_would_be_pushed_is_left_to_its_lease_when_the_client_leaves() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let attempt = prefill.attempt().await;
    asked.abort();
    prefill.cancelled().await;
    attempt.send(handed("kv-crossed"));
    while stage.handoffs("abandoned").await == 0 {
        tokio::task::yield_now().await;
    }
    assert!(decode.is_idle(), "a decode engine cannot give it back");
}

#[tokio::test]
async fn a_decode_engine_that_is_never_pushed_to_is_given_up() {
    let (stage, mut prefill, mut decode) = pushing().await;
    let asked = stage.ask_shortly();
    let attempt = prefill.attempt().await;
    attempt.send(Delta {
        kv_lease_ms: Some(100),
        ..handed("kv-1")
    });
    let waits = decode.attempt().await;
    // Nothing comes.
    assert_eq!(decode.cancelled().await, waits.stream);
    prefill.hand_on("kv-2").await;
    answer(&decode.attempt().await, "yes");
    assert_eq!(asked.await.unwrap().status, 200);
    assert_eq!(stage.handoffs("failed").await, 1);
}
