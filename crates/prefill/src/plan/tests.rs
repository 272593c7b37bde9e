use std::time::Duration;

use stator_common::proto::worker::{self, Sampling};
use stator_engine::handoff::Connector;

use super::*;

fn prefill(connector: Connector) -> Prefill {
    Prefill::new(HandOff {
        connector,
        lease: Duration::from_secs(30),
    })
}

fn request() -> GenerateRequest {
    GenerateRequest {
        leg: Leg::Prefill.into(),
        prompt_tokens: vec![1, 0, 0, 0].into(),
        sampling: Some(Sampling {
            max_tokens: 100,
            min_tokens: 7,
            temperature: Some(0.7),
            seed: Some(3),
            stop_token_ids: vec![5],
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

fn progress() -> Progress {
    Progress {
        leg: Leg::Prefill,
        started: false,
        prompt_tokens: 1,
    }
}

fn last(finish: FinishReason, params: &'static [u8]) -> Delta {
    Delta {
        stream: 9,
        tokens: vec![4],
        finish: finish.into(),
        kv_transfer_params: params.into(),
        ..Delta::default()
    }
}

#[test]
fn one_token_is_asked_for_and_the_rest_of_the_sampling_stays() {
    let mut asked = request();
    assert_eq!(
        prefill(Connector::Nixl).request(&mut asked),
        Ok(Leg::Prefill)
    );
    let expected = Sampling {
        max_tokens: 1,
        min_tokens: 1,
        ..request().sampling.expect("set")
    };
    assert_eq!(asked.sampling, Some(expected));
    assert!(!asked.kv_transfer_params.is_empty());
}

#[test]
fn where_only_a_length_end_keeps_kv_no_token_is_an_end() {
    let mut asked = request();
    asked.transfer_id = "t".to_owned();
    let leg = prefill(Connector::Mooncake).request(&mut asked);
    assert_eq!(leg, Ok(Leg::Prefill));
    let sampling = asked.sampling.expect("set");
    assert!(sampling.ignore_eos && sampling.stop_token_ids.is_empty());
    assert_eq!(sampling.all_stop_token_ids, [5]);
}

#[test]
fn what_is_no_prompt_to_hand_on_is_refused_by_field() {
    let mut with_params = request();
    with_params.kv_transfer_params = vec![0x80].into();
    let mut refused = vec![
        (Connector::Nixl, with_params, "kv_transfer_params"),
        (Connector::NixlPush, request(), "transfer_id"),
    ];
    for leg in [Leg::Unspecified, Leg::Decode, Leg::Local, Leg::Release] {
        let mut other = request();
        other.leg = leg.into();
        refused.push((Connector::Nixl, other, "leg"));
    }
    for (connector, mut request, field) in refused {
        let error = prefill(connector).request(&mut request).expect_err(field);
        assert_eq!(error.code(), worker::Code::InvalidRequest);
        assert_eq!(error.field, field);
    }
}

#[test]
fn an_end_without_parameters_is_an_error_and_never_a_success() {
    for finish in [FinishReason::Length, FinishReason::Stop] {
        let mut lost = last(finish, b"");
        prefill(Connector::Nixl).delta(&progress(), &mut lost);
        let error = lost.error.as_ref().expect("an error");
        assert_eq!(error.code(), worker::Code::Internal);
        assert_eq!((lost.stream, lost.finish()), (9, FinishReason::Error));
        assert!(error.message.contains("NixlConnector"), "{}", error.message);
    }
    let mut silent = last(FinishReason::Length, b"");
    prefill(Connector::Mooncake).delta(&progress(), &mut silent);
    assert_eq!(silent, last(FinishReason::Length, b""));
}

#[test]
fn parameters_pass_untouched_with_their_lease() {
    let mut kept = last(FinishReason::Stop, b"\x80");
    prefill(Connector::Nixl).delta(&progress(), &mut kept);
    let expected = Delta {
        kv_lease_ms: Some(30_000),
        ..last(FinishReason::Stop, b"\x80")
    };
    assert_eq!(kept, expected);
}
