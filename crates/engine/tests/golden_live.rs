//! The installed vLLM, asked now: its decoder on what we write, and its sources on the tables.
//!
//! `testkit::vllm` says how it is found. `STATOR_BLESS=1` writes `golden/<release>/requests.json` instead
//! of comparing, and with `STATOR_VLLM_SOURCES` for another release than the installed one.

#[allow(dead_code)]
mod cases;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cases::{cases, hex, written};
use serde_json::Value;
use stator_engine::{
    flags::EngineFlag,
    introspect::introspect,
    schema::{Release, Schema, Untested},
};
use stator_testkit::vllm::python;

fn root() -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
    crates.ancestors().nth(2).expect("crates/engine").to_owned()
}

fn decoded_by(python: &Path, version: &str) -> Value {
    let mut command = Command::new(python);
    command
        .arg(root().join("scripts/golden.py"))
        .arg("requests");
    if let Some(sources) = std::env::var_os("STATOR_VLLM_SOURCES") {
        command.arg("--sources").arg(sources);
    }
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.expect("python starts");
    let written = written(version)
        .into_iter()
        .map(|(name, bytes)| (name, hex(&bytes).into()));
    let written = Value::Object(written.collect()).to_string();
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(written.as_bytes()).expect("python reads");
    drop(stdin);
    let output = child.wait_with_output().expect("python ends");
    assert!(output.status.success(), "vLLM's decoder failed");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let decoded: Value = serde_json::from_str(&text).expect("JSON");
    if std::env::var_os("STATOR_BLESS").is_some() {
        let Release(major, minor) =
            Release::parse(decoded["vllm_version"].as_str().expect("a version")).expect("release");
        let path = format!("crates/engine/tests/golden/v{major}_{minor}/requests.json");
        std::fs::write(root().join(path), text).expect("written");
    }
    decoded
}

#[test]
fn the_installed_vllm_reads_what_we_write() {
    let Some(python) = python() else { return };
    let version = introspect(&python)
        .expect("vLLM is installed")
        .schema
        .vllm_version;
    let decoded = decoded_by(&python, &version);
    for case in cases() {
        assert_eq!(
            decoded["decoded"][&case.name], case.expected,
            "{}",
            case.name
        );
    }
}

#[test]
fn the_installed_vllm_is_described_without_importing_it() {
    let Some(python) = python() else { return };
    let installed = introspect(&python).expect("vLLM is installed");
    let version = &installed.schema.vllm_version;
    let built_in = Schema::built_in(version, Untested::Refuse).expect("a supported release");
    assert_eq!(installed.schema, built_in);
    assert!(installed.flags.len() > 250);
    let known = |flags: &[EngineFlag], name: &str| {
        flags
            .iter()
            .any(|flag| flag.names.iter().any(|known| known == name))
    };
    for name in [
        "--max-model-len",
        "-tp",
        "--kv-transfer-config",
        "--tool-call-parser",
    ] {
        assert!(known(&installed.flags, name), "{name}");
        assert!(known(&EngineFlag::built_in(), name), "{name}");
    }
}
