//! A prefill and a decode worker in this process, with simulated engines that hand KV on over their side channel.

mod support;

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use stator_common::{
    card::{HandOffProtocol, Role},
    plane::{Client, ClientConfig},
    proto::worker::{Code, Delta, FinishReason, GenerateRequest, Leg},
};
use stator_testkit::{
    client::{outcome, request, submit},
    wait::{PATIENCE, until},
};
use support::{Cluster, code};

/// A failed fetch is found out at once.
const QUICK: &str = "--sim-speedup 0 --sim-kv-failure-ms 1";

fn leg(leg: Leg, params: &Bytes) -> GenerateRequest {
    GenerateRequest {
        leg: leg.into(),
        kv_transfer_params: params.clone(),
        ..request(1..200, 20)
    }
}

/// Has a prompt computed, and returns the last delta.
async fn computed(prefill: &Client) -> Delta {
    let computed = outcome(prefill, &leg(Leg::Prefill, &Bytes::new())).await;
    assert_eq!(computed.error, None);
    computed
}

/// Returns parameters that name another request, which nobody has computed.
fn of_nobody(params: &[u8]) -> Bytes {
    let mut params = params.to_vec();
    let at = params.windows(5).position(|five| five == b"test-");
    params[at.expect("the engine's id of the request")] = b'T';
    params.into()
}

#[tokio::test]
async fn a_prompt_that_another_engine_computed_goes_on_as_if_it_were_ones_own() {
    let (_alone, _engine, _, agg) = Cluster::serving(QUICK).await;
    let whole = outcome(&agg, &request(1..200, 20)).await;
    let (_p, _p_engine, card, prefill) = Cluster::handing(Role::Prefill, QUICK).await;
    let (_d, _d_engine, other, decode) = Cluster::handing(Role::Decode, QUICK).await;
    assert_eq!((card.role, other.role), (Role::Prefill, Role::Decode));
    let handoff = card.handoff.expect("hands on");
    assert_eq!(Some(&handoff), other.handoff.as_ref());
    assert_eq!(
        (&handoff.connector[..], handoff.protocol),
        ("NixlConnector", HandOffProtocol::ResponseCarried)
    );

    let computed = computed(&prefill).await;
    assert_eq!(computed.tokens, whole.tokens[..1]);
    assert_eq!(computed.finish(), FinishReason::Length);
    assert!((1..=30_000).contains(&computed.kv_lease_ms.expect("a lease")));
    let fetched = outcome(&decode, &leg(Leg::Decode, &computed.kv_transfer_params)).await;
    assert_eq!(fetched.error, None);
    assert_eq!(fetched.tokens, whole.tokens);
    assert_eq!(fetched.finish(), FinishReason::Length);
    // All but the last token, which every engine computes.
    assert!(fetched.cached_tokens.expect("the first delta") >= 198);
    let local = outcome(&decode, &leg(Leg::Local, &Bytes::new())).await;
    assert_eq!(local.tokens, whole.tokens);
}

#[tokio::test]
async fn a_leg_of_another_role_is_refused() {
    let (_p, _p_engine, _, prefill) = Cluster::handing(Role::Prefill, QUICK).await;
    let (_d, _d_engine, _, decode) = Cluster::handing(Role::Decode, QUICK).await;
    let (_alone, _engine, _, agg) = Cluster::serving(QUICK).await;
    for (client, legs) in [
        (
            &prefill,
            &[Leg::Unspecified, Leg::Decode, Leg::Local, Leg::Release][..],
        ),
        (&decode, &[Leg::Unspecified, Leg::Prefill]),
        (&agg, &[Leg::Prefill, Leg::Decode, Leg::Release]),
    ] {
        for wrong in legs {
            let refused = outcome(client, &leg(*wrong, &Bytes::new())).await;
            assert_eq!(code(&refused), Code::InvalidRequest);
            assert_eq!(refused.error.expect("an error").field, "leg");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_fetched_is_a_failed_hand_off_and_the_engine_goes_on() {
    let (_p, _p_engine, _, prefill) = Cluster::handing(Role::Prefill, QUICK).await;
    let (_d, _d_engine, _, decode) = Cluster::handing(Role::Decode, QUICK).await;
    let params = computed(&prefill).await.kv_transfer_params;
    let lost = outcome(&decode, &leg(Leg::Decode, &of_nobody(&params))).await;
    assert_eq!(code(&lost), Code::HandoffFailed);
    assert!(lost.tokens.is_empty());
    for poison in [
        &b"\xc1"[..],
        b"\x80",
        b"\x90",
        b"\x81\xb1do_remote_prefill\xc3",
    ] {
        let refused = outcome(&decode, &leg(Leg::Decode, &Bytes::from_static(poison))).await;
        assert_eq!(code(&refused), Code::InvalidRequest);
        assert_eq!(refused.error.expect("an error").field, "kv_transfer_params");
    }
    let fetched = outcome(&decode, &leg(Leg::Decode, &params)).await;
    assert_eq!((fetched.error, fetched.tokens.len()), (None, 20));
}

#[tokio::test]
async fn released_kv_is_let_go_of() {
    let (_p, _p_engine, _, prefill) = Cluster::handing(Role::Prefill, QUICK).await;
    let (_d, _d_engine, _, decode) = Cluster::handing(Role::Decode, QUICK).await;
    let params = computed(&prefill).await.kv_transfer_params;
    // A release needs no prompt.
    let mut release = leg(Leg::Release, &params);
    release.prompt_tokens = Bytes::new();
    release.sampling = None;
    let released = outcome(&decode, &release).await;
    assert_eq!(
        (released.finish(), &released.error),
        (FinishReason::Abort, &None)
    );
    until_free(&prefill, &decode).await;
    let late = outcome(&decode, &leg(Leg::Decode, &params)).await;
    assert_eq!(code(&late), Code::HandoffFailed);
}

#[tokio::test]
async fn kv_of_a_prompt_whose_end_crossed_its_cancel_can_still_be_released() {
    // No lease ends while this runs.
    let flags = format!("{QUICK} --sim-kv-lease-ms 3600000");
    let (cluster, _p_engine, _, _) = Cluster::handing(Role::Prefill, &flags).await;
    let (_d, _d_engine, _, decode) = Cluster::handing(Role::Decode, QUICK).await;
    let unclaimed = Arc::new(Mutex::new(Vec::new()));
    let found = unclaimed.clone();
    let config = ClientConfig {
        unclaimed: Arc::new(move |delta: Delta| found.lock().push(delta)),
        ..ClientConfig::default()
    };
    let prefill = Client::connect(&cluster.address, config);
    prefill.ready().await.expect("connect");
    // Each is given up a little later than the one before, so that cancels meet their prompts everywhere on
    // the way: unsent, in the engine, and on the way back.
    for polls in 0..200 {
        let mut prompt = leg(Leg::Prefill, &Bytes::new());
        // None shares a block with another.
        prompt.prompt_tokens = request(polls + 2..polls + 201, 1).prompt_tokens;
        let stream = submit(&prefill, &prompt);
        for _ in 0..polls {
            tokio::task::yield_now().await;
        }
        drop(stream);
    }
    cluster.until_requests(0).await;
    // One that is waited for, so that what came before it has been dealt with.
    let last = computed(&prefill).await;
    let mut kept = std::mem::take(&mut *unclaimed.lock());
    assert!(!kept.is_empty());
    kept.push(last);
    for delta in kept {
        assert!(delta.kv_lease_ms.is_some());
        let params = delta.kv_transfer_params;
        outcome(&decode, &leg(Leg::Release, &params)).await;
    }
    until_free(&prefill, &decode).await;
}

#[tokio::test]
async fn kv_of_a_prompt_whose_end_crossed_its_deadline_can_still_be_released() {
    let flags = "--sim-prefill-us-per-token 10 --sim-kv-lease-ms 3600000";
    let (cluster, _p_engine, _, _) = Cluster::handing(Role::Prefill, flags).await;
    let (_d, _d_engine, _, decode) = Cluster::handing(Role::Decode, QUICK).await;
    let unclaimed = Arc::new(Mutex::new(Vec::new()));
    let found = unclaimed.clone();
    let config = ClientConfig {
        unclaimed: Arc::new(move |delta: Delta| found.lock().push(delta)),
        ..ClientConfig::default()
    };
    let prefill = Client::connect(&cluster.address, config);
    prefill.ready().await.expect("connect");
    // The engine takes a few ms for each; of those the ends of some cross.
    let mut kept = Vec::new();
    for round in 0..40 {
        let mut prompt = leg(Leg::Prefill, &Bytes::new());
        prompt.prompt_tokens = request(round + 2..round + 201, 1).prompt_tokens;
        prompt.deadline_ms = Some(u64::from(round % 8));
        let answer = outcome(&prefill, &prompt).await;
        if answer.error.is_none() {
            kept.push(answer);
        } else {
            assert_eq!(code(&answer), Code::DeadlineExceeded);
        }
    }
    cluster.until_requests(0).await;
    kept.push(computed(&prefill).await);
    kept.append(&mut unclaimed.lock());
    for delta in kept {
        outcome(&decode, &leg(Leg::Release, &delta.kv_transfer_params)).await;
    }
    until_free(&prefill, &decode).await;
}

/// Waits until the prefill engine keeps no more than one prompt's blocks. It reports only when it computes.
async fn until_free(prefill: &Client, decode: &Client) {
    let one = 13.0 / 16_384.0;
    let probes = async {
        loop {
            let probe = computed(prefill).await;
            outcome(decode, &leg(Leg::Release, &probe.kv_transfer_params)).await;
            if prefill.load().kv_usage < 1.5 * one {
                return;
            }
        }
    };
    let freed = tokio::time::timeout(PATIENCE, probes).await;
    freed.expect("never: the engine lets go of what was released");
}

#[tokio::test]
async fn a_lease_is_as_long_as_the_engine_says() {
    let flags = format!("{QUICK} --sim-kv-lease-ms 4000");
    let (_p, _p_engine, _, prefill) = Cluster::handing(Role::Prefill, &flags).await;
    let lease = computed(&prefill).await.kv_lease_ms.expect("a lease");
    assert!((1..=4000).contains(&lease), "{lease}");
    until("the worker has no requests", || prefill.in_flight() == 0).await;
}

#[tokio::test]
async fn a_fetch_that_the_engine_does_not_begin_within_the_lease_is_given_up() {
    let (_p, _p_engine, _, prefill) = Cluster::handing(Role::Prefill, QUICK).await;
    // A prompt of 199 tokens keeps it in one step for two seconds.
    let slow = "--sim-prefill-us-per-token 10000";
    let (cluster, _d_engine, _, decode) = Cluster::handing(Role::Decode, slow).await;
    let (first, second) = (computed(&prefill).await, computed(&prefill).await);
    let busy = submit(&decode, &leg(Leg::Local, &Bytes::new()));
    cluster.until_requests(1).await;
    let hurried = GenerateRequest {
        kv_lease_ms: Some(300),
        ..leg(Leg::Decode, &first.kv_transfer_params)
    };
    let given_up = outcome(&decode, &hurried).await;
    assert_eq!(code(&given_up), Code::HandoffFailed);
    // One whose engine answers in time is left alone, however long it waits then.
    let patient = GenerateRequest {
        kv_lease_ms: Some(60_000),
        ..leg(Leg::Decode, &second.kv_transfer_params)
    };
    let waited = outcome(&decode, &patient).await;
    assert_eq!(waited.error, None);
    drop(busy);
}
