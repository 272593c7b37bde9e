use super::*;
use crate::request::{Constraint, Lora, Sampling, StructuredOutputs, Tokens};

const VOCABULARY: u32 = 100;

fn limits() -> Limits {
    Limits::new(VOCABULARY, 32)
}

fn request() -> Request {
    Request {
        id: "a".into(),
        prompt: Tokens::from(&[1, 2, 99][..]),
        sampling: Sampling {
            max_tokens: 4,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

/// Checks a request with one thing changed and returns the field at fault.
fn fault(change: impl FnOnce(&mut Request)) -> Option<&'static str> {
    let mut request = request();
    change(&mut request);
    check(request, &limits()).err().map(|invalid| invalid.field)
}

fn sampling_fault(change: impl FnOnce(&mut Sampling)) -> Option<&'static str> {
    fault(|request| change(&mut request.sampling))
}

fn constraint_fault(constraint: Constraint) -> Option<String> {
    let mut request = request();
    request.sampling.structured_outputs = Some(StructuredOutputs {
        constraint,
        disable_any_whitespace: false,
        disable_additional_properties: false,
        whitespace_pattern: None,
    });
    let invalid = check(request, &limits()).err()?;
    assert_eq!(invalid.field, "structured_outputs");
    Some(invalid.message)
}

#[test]
fn a_plain_request_passes() {
    assert_eq!(fault(|_| {}), None);
}

#[test]
fn prompts_that_end_an_engine_are_refused() {
    let prompt = |ids: &[u32]| fault(|request| request.prompt = Tokens::from(ids));
    assert_eq!(prompt(&[]), Some("prompt"));
    assert_eq!(prompt(&[VOCABULARY]), Some("prompt"));
    assert_eq!(prompt(&[1, u32::MAX, 2]), Some("prompt"));
    assert_eq!(prompt(&[1; 32]), Some("prompt"));
    assert_eq!(prompt(&[1; 1000]), Some("prompt"));
    assert_eq!(prompt(&[1; 31]), None);
}

#[test]
fn ids_are_bounded_and_printable() {
    let id = |id: &str| fault(|request| request.id = id.to_owned());
    assert_eq!(id(""), Some("id"));
    assert_eq!(id("a\nb"), Some("id"));
    assert_eq!(id(&"x".repeat(513)), Some("id"));
    assert_eq!(id(&"é".repeat(256)), None);
}

#[test]
fn numbers_keep_to_vllms_ranges() {
    macro_rules! case {
        ($field:ident: $($value:expr => $ok:expr),+ $(,)?) => {$(
            let expected = (!$ok).then_some(stringify!($field));
            let found = sampling_fault(|sampling| sampling.$field = Some($value));
            assert_eq!(found, expected, "{} = {}", stringify!($field), $value);
        )+};
    }
    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;
    case!(temperature: 0.0 => true, -0.0 => true, 2.0 => true, 1e-300 => true, 2.01 => false,
        -0.1 => false, 3.0 => false, NAN => false, INF => false);
    case!(top_p: 1.0 => true, 1e-9 => true, 0.0 => false, 1.1 => false, NAN => false);
    case!(min_p: 0.0 => true, 1.0 => true, -0.1 => false, 1.1 => false, NAN => false);
    case!(top_k: 0 => true, -1 => true, i64::MAX => true, -2 => false, i64::MIN => false);
    case!(presence_penalty: -2.0 => true, 2.0 => true, 2.1 => false, NAN => false);
    case!(frequency_penalty: -2.0 => true, 2.0 => true, -2.1 => false, INF => false);
    case!(repetition_penalty: 0.1 => true, 9.0 => true, 0.0 => false, -1.0 => false,
        NAN => false, INF => false, 1e300 => false);
    case!(seed: i64::MIN => true, i64::MAX => true, -1 => true);
    case!(logprobs: 0 => true, 20 => true, 21 => false, -1 => false, -2 => false);
    case!(prompt_logprobs: 20 => true, 21 => false, -1 => false, i32::MIN => false);
    case!(thinking_token_budget: 5 => false);
}

#[test]
fn the_whole_vocabulary_of_log_probabilities_is_for_engines_that_allow_it() {
    for (max_logprobs, ok) in [(-1, true), (500, true), (100, true), (99, false)] {
        let limits = Limits {
            max_logprobs,
            ..limits()
        };
        let mut request = request();
        request.sampling.logprobs = Some(-1);
        assert_eq!(check(request, &limits).is_ok(), ok, "{max_logprobs}");
    }
}

#[test]
fn lengths_fit_the_model() {
    assert_eq!(sampling_fault(|s| s.max_tokens = 0), Some("max_tokens"));
    assert_eq!(sampling_fault(|s| s.min_tokens = 5), Some("min_tokens"));
    assert_eq!(sampling_fault(|s| s.min_tokens = 4), None);
    let room = |max_tokens, min_tokens| {
        sampling_fault(|s| {
            s.max_tokens = max_tokens;
            s.min_tokens = min_tokens;
        })
    };
    // 32 less a prompt of 3.
    assert_eq!(room(1000, 29), None);
    assert_eq!(room(1000, 30), Some("min_tokens"));
}

#[test]
fn token_lists_stay_in_the_vocabulary_and_in_the_samplers_rows() {
    assert_eq!(
        sampling_fault(|s| s.stop_token_ids = vec![VOCABULARY]),
        Some("stop_token_ids")
    );
    assert_eq!(
        sampling_fault(|s| s.allowed_token_ids = vec![1, VOCABULARY]),
        Some("allowed_token_ids")
    );
    assert_eq!(
        sampling_fault(|s| s.allowed_token_ids = vec![1; 1025]),
        Some("allowed_token_ids")
    );
    assert_eq!(
        sampling_fault(|s| s.logit_bias = vec![(VOCABULARY, 1.0)]),
        Some("logit_bias")
    );
    assert_eq!(
        sampling_fault(|s| s.logit_bias = vec![(1, f32::NAN)]),
        Some("logit_bias")
    );
    assert_eq!(
        sampling_fault(|s| s.logit_bias = vec![(1, f32::INFINITY)]),
        None
    );
    for words in [
        vec![vec![]],
        vec![vec![VOCABULARY]],
        vec![vec![1]; 129],
        vec![vec![1; 1025]],
    ] {
        assert_eq!(sampling_fault(|s| s.bad_words = words), Some("bad_words"));
    }
    assert_eq!(
        sampling_fault(|s| s.bad_words = vec![vec![1, 2]; 128]),
        None
    );
}

#[test]
fn ends_of_sequence_beyond_the_vocabulary_are_dropped() {
    let mut request = request();
    request.sampling.eos_token_id = Some(VOCABULARY);
    request.sampling.all_stop_token_ids = vec![5, VOCABULARY + 1];
    let checked = check(request, &limits()).expect("valid");
    assert_eq!(checked.request.sampling.eos_token_id, None);
    assert_eq!(checked.request.sampling.all_stop_token_ids, [5]);
}

#[test]
fn what_the_engine_was_not_started_for_is_refused() {
    let lora = |id, path: &str| Lora {
        name: "a".into(),
        id,
        path: path.into(),
    };
    assert_eq!(fault(|r| r.lora = Some(lora(1, "/a"))), Some("lora"));
    assert_eq!(fault(|r| r.dp_rank = Some(1)), Some("dp_rank"));
    assert_eq!(fault(|r| r.dp_rank = Some(0)), None);
    let able = Limits {
        lora: true,
        speculative: true,
        structured_outputs: None,
        ..limits()
    };
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request();
        change(&mut request);
        check(request, &able).err().map(|invalid| invalid.field)
    };
    assert_eq!(with(&|r| r.lora = Some(lora(1, "/a"))), None);
    assert_eq!(with(&|r| r.lora = Some(lora(0, "/a"))), Some("lora"));
    assert_eq!(with(&|r| r.lora = Some(lora(1, ""))), Some("lora"));
    assert_eq!(with(&|r| r.sampling.min_p = Some(0.1)), Some("min_p"));
    assert_eq!(
        with(&|r| r.sampling.logit_bias = vec![(1, 1.0)]),
        Some("logit_bias")
    );
    let constrained = |r: &mut Request| {
        r.sampling.structured_outputs = Some(StructuredOutputs {
            constraint: Constraint::JsonObject,
            disable_any_whitespace: false,
            disable_additional_properties: false,
            whitespace_pattern: None,
        });
    };
    assert_eq!(with(&constrained), Some("structured_outputs"));
}

#[test]
fn extra_arguments_are_an_object_without_the_connectors_keys() {
    let args = |text: &str| sampling_fault(|s| s.extra_args = Some(text.to_owned()));
    assert_eq!(args(r#"{"a": {"b": [1, "x"]}}"#), None);
    assert_eq!(args("{}"), None);
    for text in [
        "",
        "[]",
        "null",
        "{",
        r#"{"kv_transfer_params": {}}"#,
        r#"{"ec_transfer_params": 1}"#,
        r#"{"kv_cache_report_mode": "full"}"#,
    ] {
        assert_eq!(args(text), Some("extra_args"), "{text}");
    }
    let deep = format!("{}{}", r#"{"a":"#.repeat(1000), "}".repeat(1000));
    assert_eq!(args(&deep), Some("extra_args"));
    let params = |raw: &'static [u8]| {
        fault(|request| request.kv_transfer_params = Some(bytes::Bytes::from_static(raw)))
    };
    assert_eq!(params(b"\x80"), None);
    for raw in [
        &b""[..],
        b"\x01",
        b"\x80\x80",
        b"\x81\xa1a\xd4\x03\x00",
        b"\xc0",
    ] {
        assert_eq!(params(raw), Some("kv_transfer_params"), "{raw:?}");
    }
}

#[test]
fn constraints_that_no_engine_takes_are_refused() {
    let json = |text: &str| constraint_fault(Constraint::Json(text.to_owned()));
    assert_eq!(json(r#"{"type": "object"}"#), None);
    assert!(json("").is_some());
    assert!(json("{").is_some());
    let nested = |levels: usize| {
        format!(
            "{}{}",
            r#"{"not":"#.repeat(levels - 1) + "{",
            "}".repeat(levels)
        )
    };
    assert_eq!(json(&nested(64)), None);
    assert!(json(&nested(65)).is_some());
    assert!(constraint_fault(Constraint::Choice(vec![])).is_some());
    assert!(constraint_fault(Constraint::Grammar(" \n".into())).is_some());
    assert!(constraint_fault(Constraint::Regex("a\0".into())).is_some());
    assert_eq!(constraint_fault(Constraint::Regex(String::new())), None);
    assert!(constraint_fault(Constraint::StructuralTag("[]".into())).is_some());
    assert!(constraint_fault(Constraint::StructuralTag(String::new())).is_some());
    assert!(constraint_fault(Constraint::Regex("a".repeat(2 << 20))).is_some());
}

#[test]
fn a_schema_that_xgrammar_would_bend_is_refused_by_keyword() {
    let fault = |text: &str| constraint_fault(Constraint::Json(text.to_owned()));
    for (schema, keyword) in [
        (r#"{"type": "integer", "multipleOf": 3}"#, "multipleOf"),
        (
            r#"{"type": ["number", "null"], "multipleOf": 3}"#,
            "multipleOf",
        ),
        (r#"{"type": "array", "uniqueItems": true}"#, "uniqueItems"),
        (r#"{"type": "string", "format": "color"}"#, "format"),
        (
            r#"{"type": "string", "pattern": "a", "maxLength": 3}"#,
            "length bound",
        ),
        (
            r#"{"type": "object", "propertyNames": {}, "properties": {}}"#,
            "propertyNames",
        ),
        (
            r#"{"type": "object", "patternProperties": {"a": {}, "b": {}}}"#,
            "patternProperties",
        ),
        (
            r#"{"properties": {"a": {"anyOf": [{"allOf": [{}, {}]}]}}}"#,
            "allOf",
        ),
    ] {
        let message = fault(schema).expect(schema);
        assert!(message.contains(keyword), "{schema}: {message}");
    }
    for schema in [
        r#"{"type": "string", "format": "date-time"}"#,
        r#"{"type": "string", "maxLength": 3}"#,
        r#"{"allOf": [{"type": "string"}]}"#,
        r#"{"type": "object", "patternProperties": {"a": {}}}"#,
        "true",
    ] {
        assert_eq!(fault(schema), None, "{schema}");
    }
}
