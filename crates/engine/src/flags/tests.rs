use super::*;

fn own() -> clap::Command {
    clap::Command::new("worker")
        .arg(clap::Arg::new("port").long("port").short('p'))
        .arg(
            clap::Arg::new("keep")
                .long("engine-keep")
                .action(clap::ArgAction::SetTrue),
        )
}

fn run(line: &str) -> Result<Split, FlagError> {
    let argv = ["worker"].into_iter().chain(line.split_whitespace());
    split(argv.map(OsString::from), &own(), &EngineFlag::built_in())
}

fn engine(line: &str) -> Vec<String> {
    run(line).expect("splits").engine
}

#[test]
fn flags_go_to_whom_they_belong_and_ours_win() {
    let split = run(
        "--port 1 Qwen/Qwen3 --engine-keep --max-model-len 2k --enforce-eager --dtype=half -p 2",
    );
    assert_eq!(
        split,
        Ok(Split {
            own: ["worker", "--port", "1", "--engine-keep", "-p", "2"]
                .map(OsString::from)
                .into(),
            model: Some("Qwen/Qwen3".into()),
            engine: ["--max-model-len", "2k", "--enforce-eager", "--dtype=half"]
                .map(String::from)
                .into(),
        })
    );
}

#[test]
fn every_spelling_that_vllm_takes_passes_verbatim() {
    for line in [
        "--max_model_len 2048",
        "--no-enable-prefix-caching",
        "--no_enable_prefix_caching",
        "--kv-transfer-config {\"kv_connector\":\"NixlConnector\"}",
        "--kv-transfer-config.kv_connector NixlConnector",
        "--kv_transfer_config.kv_connector_extra_config.backends+=UCX,POSIX",
        "-cc.mode=3",
        "-tp 2",
        "-tp=2",
        "-O3",
        "-O 3",
        "-O=3",
        "-Odecode",
        "-q awq",
        "--seed -1",
        "--gpu-memory-util 0.5",
        "--allowed-media-domains a.example b.example",
        "--hf-token",
        "--hf-token x",
    ] {
        let expected: Vec<_> = line.split_whitespace().map(String::from).collect();
        assert_eq!(engine(line), expected, "{line}");
    }
}

#[test]
fn a_model_after_a_flag_without_value_is_the_model() {
    let split = run("--enforce-eager my/model --trust-remote-code").expect("splits");
    assert_eq!(split.model.as_deref(), Some("my/model"));
    for line in ["--model my/model", "--model=my/model"] {
        let split = run(line).expect("splits");
        assert_eq!(split.model.as_deref(), Some("my/model"), "{line}");
        assert!(split.engine.is_empty());
    }
    assert!(matches!(run("a b"), Err(FlagError::TwoModels { .. })));
}

#[test]
fn an_unknown_flag_fails_and_names_the_nearest() {
    for (line, nearest) in [
        ("--max-model-length 5", Some("--max-model-len")),
        ("--enforce-eagr", Some("--enforce-eager")),
        ("--engine-kep", Some("--engine-keep")),
        ("--frobnicate", None),
        ("-Z", None),
    ] {
        let flag = line.split(' ').next().expect("a flag").to_owned();
        let nearest = nearest.map(String::from);
        assert_eq!(
            run(line),
            Err(FlagError::Unknown { flag, nearest }),
            "{line}"
        );
    }
}

#[test]
fn a_flag_without_its_value_a_reserved_and_an_ambiguous_one_fail() {
    assert!(matches!(
        run("--max-model-len"),
        Err(FlagError::NoValue { .. })
    ));
    assert!(matches!(
        run("--dtype --seed 1"),
        Err(FlagError::NoValue { .. })
    ));
    for line in ["--headless", "-dpl 2", "--data_parallel_address=x"] {
        assert!(
            matches!(run(line), Err(FlagError::Reserved { .. })),
            "{line}"
        );
    }
    assert!(matches!(
        run("--max-num 1"),
        Err(FlagError::Ambiguous { .. })
    ));
}

#[test]
fn what_follows_two_dashes_is_the_engines_unchecked() {
    let split = run("m -- --from-a-plug-in x --port 3").expect("splits");
    assert_eq!(split.engine, ["--from-a-plug-in", "x", "--port", "3"]);
    assert_eq!(split.own, ["worker"]);
}

#[test]
fn the_python_is_found_before_anything_is_split() {
    let argv = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    let value = |line| own_value(&argv(line), "python");
    assert_eq!(value("w m --python p --x"), Some("p".into()));
    assert_eq!(value("w --python=p"), Some("p".into()));
    assert_eq!(value("w --pythonic p -- --python q"), None);
}

#[test]
fn a_flag_is_read_under_its_long_name_in_every_spelling_and_the_last_one_counts() {
    let line = "--max_logprobs 5 --max-logp=40 -tp 2 -pp=3 -O3 -sc {} --enable-lora --no-enable-lora \
                --reasoning-config.x 1 --skip-tok --of_a_plugin 7";
    let args: Vec<String> = line.split_whitespace().map(String::from).collect();
    let given = Given::read(&args);
    for (name, value) in [
        ("max-logprobs", "40"),
        ("tensor-parallel-size", "2"),
        ("pipeline-parallel-size", "3"),
        ("optimization-level", "3"),
        ("speculative-config", "{}"),
        ("reasoning-config.x", "1"),
        ("of-a-plugin", "7"),
    ] {
        assert_eq!(given.value(name), Some(value), "{name}");
    }
    assert!(given.has("reasoning-config") && given.has("skip-tokenizer-init"));
    assert!(!given.has("enable-lora") && !given.has("spec-method"));
}

#[test]
fn all_values_of_a_flag_are_read_as_it_is_given_last() {
    let line = "--lora-modules a=/a --enable-lora --lora-mod b=/b {\"name\":\"c\"} --max-loras 2 x";
    let args: Vec<String> = line.split(' ').map(String::from).collect();
    let values = |name| {
        Given::read(&args)
            .values(name)
            .map(String::from)
            .collect::<Vec<_>>()
    };
    assert_eq!(values("lora-modules"), ["b=/b", "{\"name\":\"c\"}"]);
    assert_eq!(values("max-loras"), ["2"]);
    assert!(values("max-lora-rank").is_empty());
}

#[test]
fn a_value_behind_an_equals_sign_may_have_blanks() {
    let argument = r#"--override_generation_config={"top_k": 9}"#.to_owned();
    let argv = ["worker".to_owned(), argument.clone()].map(OsString::from);
    let split = split(argv, &own(), &EngineFlag::built_in()).expect("splits");
    assert_eq!((split.engine, split.model), (vec![argument.clone()], None));
    let args = [argument];
    let value = Given::read(&args).value("override-generation-config");
    assert_eq!(value, Some(r#"{"top_k": 9}"#));
}

#[test]
fn a_flag_that_takes_json_is_read_and_taken_out_in_every_spelling() {
    let json = r#"{"kv_connector": "A", "n": [1]}"#;
    let args = |line: &str| -> Vec<String> { line.split(' ').map(String::from).collect() };
    let as_json = ["--kv_transfer_config".to_owned(), json.to_owned()];
    let object = Given::read(&as_json).object("kv-transfer-config");
    let object = object.expect("JSON").expect("given");
    assert_eq!(
        serde_json::Value::from(object),
        serde_json::from_str::<serde_json::Value>(json).expect("JSON")
    );
    let by_key = args(
        "-tp 2 --kv-transfer-config.a.b 3 --kv-transfer-config.a.c+=x,y --kv_transfer_config.a.c+ z",
    );
    let object = Given::read(&by_key).object("kv-transfer-config");
    let object = object.expect("JSON").expect("given");
    assert_eq!(
        serde_json::Value::from(object),
        serde_json::json!({"a": {"b": 3, "c": ["x", "y", "z"]}})
    );
    assert_eq!(without(&by_key, "kv-transfer-config"), ["-tp", "2"]);
    assert_eq!(without(&as_json, "kv-transfer-config"), [""; 0]);
    let one = args("--kv-transfer-config={} --enforce-eager -O3 --kv-transfer-conf {}");
    assert_eq!(
        without(&one, "kv-transfer-config"),
        ["--enforce-eager", "-O3"]
    );
    let bad = args("--kv-transfer-config [1]");
    assert!(Given::read(&bad).object("kv-transfer-config").is_err());
}
