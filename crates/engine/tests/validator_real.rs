//! The validator in front of a real vLLM: what ends an engine is refused and the engine goes on
//! answering; what is allowed at the edges reaches it, and it goes on answering too.
//!
//! Fails where there is no vLLM; `testkit::vllm` says how it is found.

#[allow(dead_code)]
mod support;

use bytes::Bytes;
use stator_engine::{
    Constraint, Engine, Finish, Lora, Request, Sampling, StructuredOutputs, SubmitError, Tokens,
};
use stator_testkit::vllm::Vllm;
use support::{Collected, request, spawn_config};

const MAX_MODEL_LEN: u32 = 2048;

/// Each way to end an engine of table 2.8 in its terms, and the field that is named.
fn deadly(vocabulary: u32) -> Vec<(&'static str, Request, &'static str)> {
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = request("deadly", 30..40, 3);
        change(&mut request);
        request
    };
    let sampling = |change: &dyn Fn(&mut Sampling)| with(&|request| change(&mut request.sampling));
    let params = |raw: &'static [u8]| {
        with(&|request| request.kv_transfer_params = Some(Bytes::from_static(raw)))
    };
    let prompt = |ids: &[u32]| with(&|request| request.prompt = Tokens::from(ids));
    vec![
        (
            "a token beyond the vocabulary",
            prompt(&[5, vocabulary]),
            "prompt",
        ),
        ("a token far beyond it", prompt(&[u32::MAX]), "prompt"),
        ("an empty prompt", prompt(&[]), "prompt"),
        (
            "a prompt as long as the model",
            prompt(&[5; MAX_MODEL_LEN as usize]),
            "prompt",
        ),
        ("top_p=0", sampling(&|s| s.top_p = Some(0.0)), "top_p"),
        (
            "temperature=3",
            sampling(&|s| s.temperature = Some(3.0)),
            "temperature",
        ),
        ("NaN", sampling(&|s| s.min_p = Some(f64::NAN)), "min_p"),
        (
            "min_tokens beyond max_tokens",
            sampling(&|s| s.min_tokens = 4),
            "min_tokens",
        ),
        (
            "no tokens at all",
            sampling(&|s| s.max_tokens = 0),
            "max_tokens",
        ),
        (
            "a negative count",
            sampling(&|s| s.logprobs = Some(-2)),
            "logprobs",
        ),
        (
            "too many log-probabilities",
            sampling(&|s| s.prompt_logprobs = Some(500)),
            "prompt_logprobs",
        ),
        (
            "a bias beyond the vocabulary",
            sampling(&|s| s.logit_bias = vec![(vocabulary, 1.0)]),
            "logit_bias",
        ),
        (
            "a stop beyond the vocabulary",
            sampling(&|s| s.stop_token_ids = vec![vocabulary]),
            "stop_token_ids",
        ),
        ("broken msgpack", params(b"\x81\xa1a"), "kv_transfer_params"),
        (
            "an unknown extension",
            params(b"\x81\xa1a\xd4\x2a\x00"),
            "kv_transfer_params",
        ),
        (
            "two values for one",
            params(b"\x80\x80"),
            "kv_transfer_params",
        ),
        (
            "broken text",
            params(b"\x81\xa1a\xa1\xff"),
            "kv_transfer_params",
        ),
        (
            "parameters that are no map",
            params(b"\x01"),
            "kv_transfer_params",
        ),
        (
            "a connector's key from a client",
            sampling(&|s| s.extra_args = Some(r#"{"kv_transfer_params": 5}"#.into())),
            "extra_args",
        ),
        (
            "an adapter that the engine cannot load",
            with(&|request| {
                request.lora = Some(Lora {
                    name: "a".into(),
                    id: 1,
                    path: "/nowhere".into(),
                });
            }),
            "lora",
        ),
        (
            "a rank that does not exist",
            with(&|request| request.dp_rank = Some(1)),
            "dp_rank",
        ),
    ]
}

/// What is allowed and odd: reaches the engine, and ends in one way or another.
fn odd(vocabulary: u32) -> Vec<(&'static str, Request)> {
    let sampling = |change: &dyn Fn(&mut Sampling)| {
        let mut request = request("odd", 30..40, 3);
        change(&mut request.sampling);
        request
    };
    let constrained = |constraint: Constraint| {
        sampling(&|s| {
            s.structured_outputs = Some(StructuredOutputs {
                constraint: constraint.clone(),
                disable_any_whitespace: false,
                disable_additional_properties: false,
                whitespace_pattern: None,
            });
        })
    };
    let regex = |text: &str| constrained(Constraint::Regex(text.into()));
    let json = |text: &str| constrained(Constraint::Json(text.into()));
    vec![
        (
            "every number at its edge",
            sampling(&|s| {
                s.temperature = Some(1e-300);
                s.top_p = Some(f64::MIN_POSITIVE);
                s.top_k = Some(i64::MAX);
                s.min_p = Some(1.0);
                s.seed = Some(i64::MIN);
                s.presence_penalty = Some(-2.0);
                s.frequency_penalty = Some(2.0);
                s.repetition_penalty = Some(f64::from(f32::MAX));
                s.max_tokens = u32::MAX;
                s.min_tokens = 2;
                s.stop_token_ids = (0..128).collect();
                s.ignore_eos = false;
            }),
        ),
        (
            "every token list",
            sampling(&|s| {
                s.logit_bias = (0..vocabulary).map(|id| (id, f32::NEG_INFINITY)).collect();
                s.allowed_token_ids = (0..vocabulary).collect();
                s.bad_words = (0..128).map(|id| vec![id]).collect();
                s.logprobs = Some(20);
                s.prompt_logprobs = Some(20);
            }),
        ),
        (
            "no room but for one token",
            request("odd", 0..MAX_MODEL_LEN - 1, 500),
        ),
        (
            "ends of sequence that the model lacks",
            sampling(&|s| {
                s.ignore_eos = false;
                s.min_tokens = 2;
                s.eos_token_id = Some(u32::MAX);
                s.all_stop_token_ids = vec![vocabulary, 7];
            }),
        ),
        ("a regular expression", regex("[ab]{2}")),
        ("a broken regular expression", regex("(")),
        (
            "a huge regular expression",
            regex("((a{1000}){1000}){1000}"),
        ),
        ("an empty regular expression", regex("")),
        (
            "a choice",
            constrained(Constraint::Choice(vec!["a\"\\\n".into(), "é".into()])),
        ),
        ("a schema", json(r#"{"type": "object"}"#)),
        ("a schema of nothing", json("false")),
        ("a schema that is a number", json("5")),
        (
            "a reference to nowhere",
            json(r##"{"$ref": "#/$defs/none"}"##),
        ),
        ("a reference to itself", json(r##"{"$ref": "#"}"##)),
        (
            "a huge array",
            json(r#"{"type": "array", "minItems": 100000000}"#),
        ),
        ("a bent schema", json(r#"{"type": 5, "properties": []}"#)),
        (
            "a grammar",
            constrained(Constraint::Grammar("root ::= \"a\" root".into())),
        ),
        (
            "a grammar without a root",
            constrained(Constraint::Grammar("rot ::= \"a\"".into())),
        ),
        (
            "a grammar that recurses at once",
            constrained(Constraint::Grammar("root ::= root".into())),
        ),
        (
            "a broken Lark grammar",
            constrained(Constraint::Grammar("start: (".into())),
        ),
        (
            "an empty tag",
            constrained(Constraint::StructuralTag("{}".into())),
        ),
        (
            "a bent tag",
            constrained(Constraint::StructuralTag(r#"{"structures": [5]}"#.into())),
        ),
        (
            "hand-off parameters without a connector",
            Request {
                // {"do_remote_prefill": true, "remote_block_ids": 5}
                kv_transfer_params: Some(Bytes::from_static(
                    b"\x82\xb1do_remote_prefill\xc3\xb0remote_block_ids\x05",
                )),
                ..request("odd", 30..40, 3)
            },
        ),
        (
            "headers, a salt and arguments",
            Request {
                cache_salt: Some("\u{0}é".into()),
                priority: i32::MIN,
                trace_headers: vec![("traceparent".into(), "nonsense".into())],
                ..sampling(&|s| {
                    s.extra_args = Some(r#"{"of_no_connector": [1e308, -1]}"#.into());
                })
            },
        ),
    ]
}

/// The engine answers, and as it always did.
async fn answers(engine: &Engine, collected: &mut Collected, after: &str) -> Vec<u32> {
    let handle = engine.submit(request("probe", 30..60, 4)).expect(after);
    let (tokens, finish) = collected.finished(handle.key()).await;
    assert_eq!((tokens.len(), finish), (4, Finish::Length), "after {after}");
    tokens
}

#[tokio::test]
async fn nothing_that_a_client_sends_ends_the_engine() {
    let Some(vllm) = Vllm::find() else { return };
    let dir = tempfile::tempdir().expect("temporary folder");
    let (engine, mut collected) = support::start(spawn_config(&vllm, dir.path(), false)).await;
    let vocabulary = engine.info().vocab_size;
    let tokens = answers(&engine, &mut collected, "nothing").await;

    for (what, request, field) in deadly(vocabulary) {
        match engine.submit(request) {
            Err(SubmitError::Invalid(invalid)) => assert_eq!(invalid.field, field, "{what}"),
            Err(other) => panic!("{what}: {other}"),
            Ok(_) => panic!("{what} passes"),
        }
    }
    assert_eq!(
        answers(&engine, &mut collected, "what was refused").await,
        tokens
    );

    for (what, request) in odd(vocabulary) {
        let handle = engine.submit(request).expect(what);
        let (made, finish) = collected.finished(handle.key()).await;
        println!("{what}: {finish:?} after {} tokens", made.len());
        assert_eq!(answers(&engine, &mut collected, what).await, tokens);
    }

    // The same id while it lives, and an abort of what has ended.
    let twins = ["twin"; 2].map(|id| engine.submit(request(id, 30..60, 4)).expect("submit"));
    for twin in &twins {
        assert_eq!(collected.finished(twin.key()).await.0, tokens);
    }
    drop(twins);

    // No output ever comes; the handle is all there is.
    let silent = Request {
        abort_immediately: true,
        ..request("silent", 30..40, 3)
    };
    let silent = engine.submit(silent).expect("submit");
    assert_eq!(
        answers(&engine, &mut collected, "an immediate abort").await,
        tokens
    );
    assert_eq!(collected.finishes(silent.key()), 0);
    engine.shutdown().await;
}
