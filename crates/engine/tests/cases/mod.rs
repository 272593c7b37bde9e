//! Messages to the engine, each beside what the engine must understand.

mod constraints;
mod others;
mod requests;
mod samplings;

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
                    wave: 0,
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

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = requests::all();
    cases.extend(samplings::all());
    cases.extend(constraints::all());
    cases.extend(others::all());
    cases
}
