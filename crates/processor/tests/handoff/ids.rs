//! Hand-offs whose engines know them by an id that the processor gives.

use stator_common::Code;
use stator_common::card::{HandOffProtocol, Role};
use stator_common::plane::tcp::delta::failed;
use stator_common::proto::worker::{FinishReason, Leg};
use stator_processor::config::Config;

use crate::stage::{Played, Stage, answer};

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
