use std::time::Duration;

use stator_common::proto::worker::Sampling;
use stator_engine::handoff::Connector;
use stator_worker::plan::fail;

use super::*;

/// `{}`, which is all that LMCache needs.
const EMPTY_MAP: &[u8] = &[0x80];

fn decode(connector: Connector) -> Decode {
    Decode::new(HandOff {
        connector,
        lease: Duration::from_secs(30),
    })
}

fn request(leg: Leg, params: &'static [u8]) -> GenerateRequest {
    GenerateRequest {
        leg: leg.into(),
        kv_transfer_params: params.into(),
        sampling: Some(Sampling {
            max_tokens: 5,
            prompt_logprobs: Some(1),
            skip_reading_prefix_cache: Some(true),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

fn progress(leg: Leg) -> Progress {
    Progress {
        leg,
        started: false,
        prompt_tokens: 100,
    }
}

fn failed(code: Code) -> Delta {
    let mut delta = Delta::default();
    fail(&mut delta, code, "x");
    delta
}

fn code(delta: &Delta) -> worker::Code {
    delta.error.as_ref().expect("an error").code()
}

#[test]
fn a_request_without_its_hand_off_is_never_a_silent_prefill() {
    for (leg, params, field) in [
        (Leg::Unspecified, &b""[..], "leg"),
        (Leg::Unspecified, EMPTY_MAP, "leg"),
        (Leg::Prefill, b"", "leg"),
        (Leg::Decode, b"", "kv_transfer_params"),
        (Leg::Release, b"", "kv_transfer_params"),
        (Leg::Local, EMPTY_MAP, "kv_transfer_params"),
        (Leg::Decode, b"poison", "kv_transfer_params"),
    ] {
        let mut request = request(leg, params);
        let decode = decode(Connector::LmCacheMp);
        let error = decode.request(&mut request).expect_err("refused");
        assert_eq!(error.code(), worker::Code::InvalidRequest);
        assert_eq!(error.field, field, "{leg:?}");
    }
    let mut lacking = request(Leg::Decode, EMPTY_MAP);
    let error = decode(Connector::Nixl)
        .request(&mut lacking)
        .expect_err("refused");
    assert!(
        error.message.contains("do_remote_prefill"),
        "{}",
        error.message
    );
}

#[test]
fn a_fetched_prompt_is_not_computed_for_its_log_probabilities() {
    let mut fetched = request(Leg::Decode, EMPTY_MAP);
    assert_eq!(
        decode(Connector::LmCacheMp).request(&mut fetched),
        Ok(Leg::Decode)
    );
    let sampling = fetched.sampling.expect("set");
    assert_eq!(
        (sampling.prompt_logprobs, sampling.skip_reading_prefix_cache),
        (None, None)
    );
    assert_eq!(&fetched.kv_transfer_params[..], EMPTY_MAP);
    let mut local = request(Leg::Local, b"");
    assert_eq!(
        decode(Connector::LmCacheMp).request(&mut local),
        Ok(Leg::Local)
    );
    assert_eq!(local.sampling.expect("set").prompt_logprobs, Some(1));
}

#[test]
fn an_error_without_a_cause_before_the_first_token_is_the_hand_offs() {
    let decode = decode(Connector::Nixl);
    let mut lost = failed(Code::Internal);
    decode.delta(&progress(Leg::Decode), &mut lost);
    assert_eq!(code(&lost), worker::Code::HandoffFailed);
    let later = Progress {
        started: true,
        ..progress(Leg::Decode)
    };
    for (progress, known) in [
        (progress(Leg::Decode), Code::EngineDead),
        (progress(Leg::Local), Code::Internal),
        (later, Code::Internal),
    ] {
        let mut delta = failed(known);
        decode.delta(&progress, &mut delta);
        assert_eq!(code(&delta), worker::Code::from(known));
    }
}
