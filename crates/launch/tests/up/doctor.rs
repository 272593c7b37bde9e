//! What `stator doctor` finds.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

use stator_testkit::vllm::Vllm;
use stator_testkit::{model, ports};
use tokio::process::Command;

use crate::launcher::stator;

async fn doctor(stator: &mut Command, line: &str) -> (Output, String) {
    let output = stator.arg("doctor").args(line.split_whitespace()).output();
    let output = output.await.expect("stator starts");
    let report = String::from_utf8(output.stdout.clone()).expect("text");
    (output, report)
}

fn says(report: &str, mark: &str, what: &str, found: &str) -> bool {
    let mut lines = report.lines();
    lines.any(|line| line.starts_with(mark) && line.contains(what) && line.contains(found))
}

/// A folder with this launcher and the processor, and what a test puts beside them.
pub(crate) fn folder() -> (tempfile::TempDir, Command) {
    let built = Path::new(env!("CARGO_BIN_EXE_stator"));
    let parent = built.parent().expect("a folder");
    let folder = tempfile::tempdir_in(parent).expect("a folder beside the programs");
    for name in ["stator", "stator-processor"] {
        // No copies: they are large.
        fs::hard_link(parent.join(name), folder.path().join(name)).expect("link");
    }
    let stator = Command::new(folder.path().join("stator"));
    (folder, stator)
}

/// Puts a worker that only answers `--preflight`.
pub(crate) fn put(folder: &tempfile::TempDir, name: &str, says: &str, status: u8) {
    let path = folder.path().join(name);
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' --preflight '*) echo \"{says}\"; exit {status};; esac\nexit 9\n"
    );
    fs::write(&path, script).expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
}

#[tokio::test]
async fn a_taken_port_and_a_refused_flag_are_found() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("a bound socket");
    let line = format!(
        "--engine sim --http-port {} --processor-arg=--nonsense",
        addr.port()
    );
    let (output, report) = doctor(&mut stator(), &line).await;
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        says(&report, "FAIL", "address of the API", "is taken"),
        "{report}"
    );
    assert!(says(&report, "FAIL", "processor", "--nonsense"), "{report}");
    assert!(says(&report, "ok", "programs", "stator-agg"), "{report}");
}

#[tokio::test]
async fn a_missing_program_is_found() {
    let (_folder, mut stator) = folder();
    let port = ports::free();
    let line = format!("m --prefill-workers 1 --decode-workers 1 --http-port {port}");
    let (output, report) = doctor(&mut stator, &line).await;
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        says(
            &report,
            "FAIL",
            "programs",
            "stator-prefill, stator-decode are not in"
        ),
        "{report}"
    );
}

#[tokio::test]
async fn what_each_worker_finds_is_in_the_report() {
    let (folder, mut stator) = folder();
    put(
        &folder,
        "stator-prefill",
        "nixl is not installed: pip install nixl",
        1,
    );
    put(&folder, "stator-decode", "nixl 1.0", 0);
    let port = ports::free();
    let line = format!("m --prefill-workers 2 --decode-workers 1 --http-port {port}");
    let (output, report) = doctor(&mut stator, &line).await;
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        says(&report, "FAIL", "prefill-0", "pip install nixl"),
        "{report}"
    );
    assert!(says(&report, "ok", "decode-0", "nixl 1.0"), "{report}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("1 thing is not as it should be"), "{said}");
}

#[tokio::test]
async fn a_package_that_a_real_engine_lacks_is_found_without_starting_it() {
    let Some(vllm) = Vllm::find() else { return };
    let mut stator = stator();
    stator.env("STATOR_PYTHON", &vllm.python);
    let line = format!(
        "{} --prefill-workers 1 --decode-workers 1 --connector nixl,kvbm --http-port {}",
        vllm.model.display(),
        ports::free()
    );
    let (output, report) = doctor(&mut stator, &line).await;
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(report.contains("DynamoConnector imports kvbm"), "{report}");
    assert!(report.contains("pip install kvbm"), "{report}");
}

#[tokio::test]
async fn flags_that_contradict_each_other_are_found() {
    let model = model::folder();
    let line = format!("{} --prefill-workers 1", model.path().display());
    let (output, report) = doctor(&mut stator(), &line).await;
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        says(&report, "FAIL", "flags", "add --decode-workers 1"),
        "{report}"
    );
}

#[tokio::test]
async fn each_worker_has_gpus_of_its_own_and_too_few_are_found() {
    let (folder, mut stator) = folder();
    put(&folder, "stator-agg", "sees $CUDA_VISIBLE_DEVICES", 0);
    let port = ports::free();
    let line = format!("m --workers 2 --tp 2 --http-port {port}");
    stator.env("CUDA_VISIBLE_DEVICES", "4,5,6,7");
    let (output, report) = doctor(&mut stator, &line).await;
    assert!(output.status.success(), "{report}");
    assert!(says(&report, "ok", "agg-0", "sees 4,5"), "{report}");
    assert!(says(&report, "ok", "agg-1", "sees 6,7"), "{report}");

    let mut stator = Command::new(folder.path().join("stator"));
    stator.env("CUDA_VISIBLE_DEVICES", "4,5,6");
    let (_, report) = doctor(&mut stator, &line).await;
    let too_few = "4 GPUs are needed (agg-0: 2, agg-1: 2)";
    assert!(says(&report, "FAIL", "GPUs", too_few), "{report}");

    let mut up = Command::new(folder.path().join("stator"));
    up.arg("up").args(line.split_whitespace());
    up.env("CUDA_VISIBLE_DEVICES", "4,5,6");
    let output = up.output().await.expect("stator starts");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains(too_few) && output.stdout.is_empty(),
        "{output:?}"
    );
}
