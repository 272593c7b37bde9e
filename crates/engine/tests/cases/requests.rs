//! What a request says besides its sampling.

use super::*;

/// Fields of the request itself.
pub(super) fn all() -> Vec<Case> {
    // {"do_remote_prefill": true, "ids": [[1, 2]], "none": nil}
    let params = b"\x83\xb1do_remote_prefill\xc3\xa3ids\x91\x92\x01\x02\xa4none\xc0";
    let params = Bytes::from_static(params);
    let handed = json!({"do_remote_prefill": true, "ids": [[1, 2]], "none": null});
    vec![
        add("the least", request(), &json!({}), &json!({})),
        add(
            "everything",
            Request {
                cache_salt: Some("tenant".into()),
                priority: -7,
                dp_rank: Some(3),
                lora: Some(Lora {
                    name: "ada".into(),
                    id: 2,
                    path: "/adapters/ada".into(),
                }),
                trace_headers: vec![("traceparent".into(), "00-1-2-01".into())],
                reasoning_ended: Some(true),
                abort_immediately: true,
                ..request()
            },
            &json!({
                "cache_salt": "tenant",
                "priority": -7,
                "data_parallel_rank": 3,
                "lora_request":
                    {"lora_name": "ada", "lora_int_id": 2, "lora_path": "/adapters/ada"},
                "trace_headers": {"traceparent": "00-1-2-01"},
                "reasoning_ended": true,
                "abort_immediately": true,
            }),
            &json!({}),
        ),
        add(
            "an empty cache salt is none",
            Request {
                cache_salt: Some(String::new()),
                ..request()
            },
            &json!({}),
            &json!({}),
        ),
        add(
            "hand-off parameters",
            Request {
                kv_transfer_params: Some(params.clone()),
                ..request()
            },
            &json!({}),
            &json!({"extra_args": {"kv_transfer_params": handed}}),
        ),
        add(
            "hand-off parameters beside extra arguments",
            Request {
                kv_transfer_params: Some(params),
                sampling: Sampling {
                    max_tokens: 5,
                    extra_args: Some(r#"{"a": 18446744073709551615, "b": [1.5, null]}"#.into()),
                    ..Sampling::default()
                },
                ..request()
            },
            &json!({}),
            &json!({"extra_args": {
                "a": u64::MAX, "b": [1.5, null], "kv_transfer_params": handed,
            }}),
        ),
    ]
}
