//! `stator worker` and `stator up --headless`: programs that become, or start, one worker.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use stator_testkit::model;
use stator_testkit::process::{self, Signal};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::doctor::folder;
use crate::launcher::stator;

#[tokio::test]
async fn a_command_line_of_dynamos_worker_becomes_the_worker_that_it_means() {
    let model = model::folder();
    let mut stator = stator();
    stator
        .args(["worker", "--is-prefill-worker", "--engine", "sim"])
        .args(["--connector", "nixl", "--print-config", "--model"])
        .arg(model.path())
        // Overruled by the flag.
        .env("DYN_VLLM_DISAGGREGATION_MODE", "decode");
    let output = stator.output().await.expect("stator starts");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    let hint = "--is-prefill-worker is an older spelling of --disaggregation-mode prefill";
    assert_eq!(said.matches(hint).count(), 1, "{said}");
    let config = String::from_utf8_lossy(&output.stdout);
    assert!(
        config.contains(&model.path().display().to_string()),
        "{config}"
    );
}

#[tokio::test]
async fn a_role_that_has_no_program_is_refused() {
    let mut stator = stator();
    stator.args(["worker", "m", "--disaggregation-mode", "encode"]);
    let output = stator.output().await.expect("stator starts");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("there is no encode worker here"), "{said}");
}

/// Ends well when it is told to, whatever it was told before.
const NODE: &str =
    "#!/bin/sh\ntrap 'exit 0' TERM\necho \"node $*\"\nwhile :; do sleep 0.05; done\n";

#[tokio::test]
async fn a_secondary_node_runs_without_a_processor_until_it_is_told_to_end() {
    let (folder, mut stator) = folder();
    let worker = folder.path().join("stator-agg");
    fs::write(&worker, NODE).expect("write");
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).expect("chmod");
    let state = tempfile::tempdir().expect("temporary folder");
    stator
        .args(["up", "--headless", "m", "--tp", "4", "--state-dir"])
        .arg(state.path())
        .args(["--", "--nnodes", "2", "--node-rank", "1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut up = stator.spawn().expect("stator starts");
    let mut lines = BufReader::new(up.stdout.take().expect("piped")).lines();
    let wanted =
        "headless | node --headless --model m --tensor-parallel-size 4 --nnodes 2 --node-rank 1";
    while let Some(line) = lines.next_line().await.expect("text") {
        if line == wanted {
            process::signal(up.id().expect("it runs"), Signal::SIGINT);
        }
    }
    assert!(up.wait().await.expect("a child of this test").success());
}
