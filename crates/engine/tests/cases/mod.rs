//! Messages to the engine, each beside what the engine must understand.

use bytes::Bytes;
use serde_json::{Value, json};
use stator_engine::{
    Constraint, Lora, Request, Sampling, StructuredOutputs, Tokens,
    schema::{Schema, Untested},
    validate::{self, Backend, Limits},
    wire::{self, AddContext, Codec},
};

/// A release with golden vectors.
pub(crate) struct Release {
    pub(crate) version: &'static str,
    pub(crate) golden: &'static str,
}

pub(crate) const RELEASES: [Release; 2] = [
    Release {
        version: "0.32.0",
        golden: include_str!("../golden/v0_32/requests.json"),
    },
    Release {
        version: "0.33.0",
        golden: include_str!("../golden/v0_33/requests.json"),
    },
];

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) message: What,
    /// Fields and sampling parameters that are not defaults, by `scripts/golden.py`.
    pub(crate) expected: Value,
}

pub(crate) enum What {
    Add(Box<Request>, Limits),
    Abort(Vec<String>),
    Utility(&'static str, Args),
    Init(Vec<String>, Vec<String>),
}

pub(crate) enum Args {
    Json(Vec<Value>),
    Lora(Lora),
}

/// Returns what is written to an engine of a version, by case.
pub(crate) fn written(version: &str) -> Vec<(String, Bytes)> {
    let schema = Schema::built_in(version, Untested::Refuse).expect("supported");
    let codec = Codec::new(&schema).expect("complete");
    let write = |case: Case| {
        let bytes = match case.message {
            What::Add(request, limits) => {
                let checked = validate::check(*request, &limits).expect(&case.name);
                let context = AddContext {
                    engine_id: "chat-1-0000002a",
                    client_index: 0,
                    arrival_time: 1_700_000_000.25,
                };
                codec.encode_add(&checked, context)
            }
            What::Abort(ids) => codec.encode_abort(ids.iter().map(String::as_str)),
            What::Utility(method, Args::Json(args)) => codec.encode_utility(0, 7, method, &args),
            What::Utility(method, Args::Lora(lora)) => {
                codec.encode_utility(0, -3, method, &[codec.lora_arg(&lora)])
            }
            What::Init(inputs, outputs) => wire::encode_init(&inputs, &outputs),
        };
        (case.name, bytes)
    };
    cases().into_iter().map(write).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn limits() -> Limits {
    Limits {
        lora: true,
        reasoning: true,
        dp_size: 4,
        ..Limits::new(152_000, 4096)
    }
}

fn request() -> Request {
    Request {
        id: "chat-1".into(),
        prompt: Tokens::from(&[0, 127, 128, 65_535, 65_536, 151_999][..]),
        sampling: Sampling {
            max_tokens: 5,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

/// What every request decodes to, with more fields and sampling parameters.
fn expected(fields: &Value, sampling: &Value) -> Value {
    let mut expected = json!({
        "request_id": "chat-1-0000002a",
        "prompt_token_ids": [0, 127, 128, 65_535, 65_536, 151_999],
        "arrival_time": 1_700_000_000.25,
        "sampling_params": {"max_tokens": 5},
    });
    merge(&mut expected, fields);
    merge(&mut expected["sampling_params"], sampling);
    expected
}

fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().expect("a map") {
        into[key] = value.clone();
    }
}

fn add(name: &str, request: Request, fields: &Value, sampling: &Value) -> Case {
    add_within(name, request, limits(), fields, sampling)
}

fn add_within(
    name: &str,
    request: Request,
    limits: Limits,
    fields: &Value,
    sampling: &Value,
) -> Case {
    Case {
        name: format!("add: {name}"),
        message: What::Add(Box::new(request), limits),
        expected: expected(fields, sampling),
    }
}

fn sampled(name: &str, sampling: Sampling, expected: &Value) -> Case {
    let request = Request {
        sampling: Sampling {
            max_tokens: sampling.max_tokens.max(5),
            ..sampling
        },
        ..request()
    };
    add(name, request, &json!({}), expected)
}

fn constrained(name: &str, backend: Backend, constraint: Constraint, expected: &Value) -> Case {
    let mut request = request();
    request.sampling.structured_outputs = Some(StructuredOutputs {
        constraint,
        disable_any_whitespace: false,
        disable_additional_properties: false,
        whitespace_pattern: None,
    });
    let limits = Limits {
        structured_outputs: Some(backend),
        ..limits()
    };
    let sampling = json!({"structured_outputs": expected});
    add_within(name, request, limits, &json!({}), &sampling)
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = requests();
    cases.extend(samplings());
    cases.extend(constraints());
    cases.extend(others());
    cases
}

/// Fields of the request itself.
fn requests() -> Vec<Case> {
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

fn samplings() -> Vec<Case> {
    let default = Sampling::default;
    vec![
        sampled(
            "every number",
            Sampling {
                temperature: Some(0.7),
                top_p: Some(0.9),
                top_k: Some(40),
                min_p: Some(0.05),
                seed: Some(i64::MIN),
                presence_penalty: Some(-2.0),
                frequency_penalty: Some(1.1),
                repetition_penalty: Some(1.3),
                max_tokens: 64,
                min_tokens: 3,
                logprobs: Some(20),
                thinking_token_budget: Some(9),
                ..default()
            },
            // 0.7 as it was given, which a float of 32 bits could not say.
            &json!({
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.05,
                "seed": i64::MIN,
                "presence_penalty": -2.0,
                "frequency_penalty": 1.1,
                "repetition_penalty": 1.3,
                "max_tokens": 64,
                "min_tokens": 3,
                "logprobs": 20,
                "thinking_token_budget": 9,
            }),
        ),
        sampled(
            "greedy forgets what picks among candidates",
            Sampling {
                temperature: Some(0.0),
                top_p: Some(0.5),
                top_k: Some(5),
                min_p: Some(0.5),
                ..default()
            },
            &json!({"temperature": 0.0}),
        ),
        sampled(
            "a tiny temperature is raised",
            Sampling {
                temperature: Some(1e-7),
                top_k: Some(-1),
                seed: Some(-1),
                ..default()
            },
            &json!({"temperature": 0.01}),
        ),
        sampled(
            "as many tokens as there is room for",
            Sampling {
                max_tokens: u32::MAX,
                ..default()
            },
            &json!({"max_tokens": 4090}),
        ),
        sampled(
            "ends of sequence",
            Sampling {
                stop_token_ids: vec![11, 10, 11],
                eos_token_id: Some(2),
                all_stop_token_ids: vec![2, 3],
                ..default()
            },
            &json!({
                "stop_token_ids": [3, 10, 11],
                "_eos_token_id": 2,
                "_all_stop_token_ids": [2, 3, 10, 11],
            }),
        ),
        sampled(
            "ignored ends of sequence still are what min_tokens masks",
            Sampling {
                stop_token_ids: vec![10],
                ignore_eos: true,
                eos_token_id: Some(2),
                all_stop_token_ids: vec![3, 999_999],
                ..default()
            },
            &json!({
                "stop_token_ids": [10],
                "ignore_eos": true,
                "_all_stop_token_ids": [2, 3, 10],
            }),
        ),
        sampled(
            "token lists",
            Sampling {
                logit_bias: vec![(5, 1.5), (6, -1000.0)],
                allowed_token_ids: vec![1, 2],
                bad_words: vec![vec![7], vec![8, 9]],
                ..default()
            },
            &json!({
                "logit_bias": {"5": 1.5, "6": -100.0},
                "allowed_token_ids": [1, 2],
                "_bad_words_token_ids": [[7], [8, 9]],
            }),
        ),
        sampled(
            "prompt log-probabilities do without the prefix cache",
            Sampling {
                prompt_logprobs: Some(0),
                logprobs: Some(0),
                ..default()
            },
            &json!({"prompt_logprobs": 0, "logprobs": 0, "skip_reading_prefix_cache": true}),
        ),
    ]
}

fn constraints() -> Vec<Case> {
    let schema = r#"{"type": "object", "properties": {"a": {"type": "integer"}}}"#;
    let choices = || Constraint::Choice(vec!["a\"b".into(), "c\n\u{7f}é".into()]);
    let tag = r#"{"structures": [], "triggers": []}"#;
    let xgrammar = Backend::Xgrammar;
    vec![
        constrained(
            "a JSON schema",
            xgrammar,
            Constraint::Json(schema.into()),
            &json!({"json": schema, "_backend": "xgrammar"}),
        ),
        constrained(
            "any JSON object",
            Backend::Guidance,
            Constraint::JsonObject,
            &json!({"json_object": true, "_backend": "guidance"}),
        ),
        constrained(
            "a regular expression",
            Backend::Outlines,
            Constraint::Regex("[ab]+".into()),
            &json!({"regex": "[ab]+", "_backend": "outlines"}),
        ),
        constrained(
            "a choice for xgrammar",
            xgrammar,
            choices(),
            &json!({
                "grammar": "root ::= \"a\\\"b\" | \"c\\n\\u007fé\"", "_backend": "xgrammar",
            }),
        ),
        constrained(
            "a choice for guidance",
            Backend::Guidance,
            choices(),
            &json!({"choice": ["a\"b", "c\n\u{7f}é"], "_backend": "guidance"}),
        ),
        constrained(
            "a grammar",
            xgrammar,
            Constraint::Grammar("root ::= \"a\"".into()),
            &json!({"grammar": "root ::= \"a\"", "_backend": "xgrammar"}),
        ),
        constrained(
            "a structural tag",
            xgrammar,
            Constraint::StructuralTag(tag.into()),
            &json!({"structural_tag": tag, "_backend": "xgrammar"}),
        ),
    ]
}

/// Everything but ADD.
fn others() -> Vec<Case> {
    let ada = Lora {
        name: "ada".into(),
        id: 2,
        path: "/adapters/ada".into(),
    };
    vec![
        Case {
            name: "abort".into(),
            message: What::Abort(vec!["a-00000001".into(), "b-00000002".into()]),
            expected: json!(["a-00000001", "b-00000002"]),
        },
        Case {
            name: "utility: sleep".into(),
            message: What::Utility("sleep", Args::Json(vec![json!(1), json!("wait")])),
            expected: json!([0, 7, "sleep", [1, "wait"]]),
        },
        Case {
            name: "utility: add_lora".into(),
            message: What::Utility("add_lora", Args::Lora(ada)),
            expected: json!([0, -3, "add_lora", [
                {"lora_name": "ada", "lora_int_id": 2, "lora_path": "/adapters/ada"},
            ]]),
        },
        Case {
            name: "init: two clients".into(),
            message: What::Init(
                vec!["tcp://h:1".into(), "tcp://h:2".into()],
                vec!["ipc:///o".into(), "tcp://h:3".into()],
            ),
            expected: json!({
                "addresses":
                    {"inputs": ["tcp://h:1", "tcp://h:2"], "outputs": ["ipc:///o", "tcp://h:3"]},
                "parallel_config": {},
            }),
        },
    ]
}
