//! What can be known to be wrong before anything is started.
//!
//! These take milliseconds, and `stator up` makes them at every start. What needs the engine's Python is left to the
//! workers' own `--preflight`, which `stator doctor` runs.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use crate::cli::Engine;
use crate::gpus::Gpus;
use crate::plan::{Part, Place, Plan, Spec};
use crate::ports;

/// A program that only reads its settings does so at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was looked at, and what was found.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) what: String,
    /// What is as it should be, or what is not and how to help it.
    pub(crate) found: Result<String, String>,
}

impl Finding {
    pub(crate) fn new(what: impl Into<String>, found: Result<String>) -> Finding {
        Finding {
            what: what.into(),
            found: found.map_err(|error| format!("{error:#}")),
        }
    }
}

/// Returns the folder of our binaries: the one that holds this program.
pub(crate) fn bin() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let dir = own.parent().context("this program has no parent folder")?;
    Ok(dir.to_path_buf())
}

/// Finds the GPUs of this machine, if the plan needs to know.
pub(crate) async fn gpus(plan: &Plan) -> Gpus {
    if plan.devices() == 0 {
        Gpus::default()
    } else {
        Gpus::find().await
    }
}

/// Fails with everything that keeps the plan from being started.
pub(crate) async fn before_start(plan: &Plan, gpus: &Gpus) -> Result<()> {
    let findings = all(plan, gpus).await;
    let wrong: Vec<String> = findings.into_iter().filter_map(|f| f.found.err()).collect();
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(())
}

/// Looks at everything.
pub(crate) async fn all(plan: &Plan, gpus: &Gpus) -> Vec<Finding> {
    let programs = Finding::new("programs", programs(plan));
    let mut findings = vec![programs];
    if !plan.up.headless {
        findings.push(Finding::new("address of the API", address(plan)));
        if findings[0].found.is_ok() {
            findings.push(Finding::new("processor", settings(plan).await));
        }
    }
    findings.push(Finding::new("GPUs", enough(plan, gpus)));
    findings
}

/// Says whether every program that the plan starts lies beside this one.
fn programs(plan: &Plan) -> Result<String> {
    let mut names: Vec<String> = plan.parts().into_iter().map(Part::program).collect();
    let own_simulator = |arg: &String| arg.starts_with("--engine-command");
    if plan.up.engine == Engine::Sim && !plan.up.worker_args.iter().any(own_simulator) {
        names.push("stator-sim".into());
    }
    names.dedup();
    let missing: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| !plan.bin.join(name).is_file())
        .collect();
    if !missing.is_empty() {
        bail!(
            "{} not in {}; build or install all programs together (cargo build --workspace --bins)",
            is_or_are(&missing),
            plan.bin.display()
        );
    }
    Ok(format!("{} in {}", names.join(", "), plan.bin.display()))
}

fn is_or_are(names: &[&str]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", names.join(", "))
}

fn address(plan: &Plan) -> Result<String> {
    let up = &plan.up;
    ports::check(&up.http_host, up.http_port)?;
    Ok(format!("{}:{} is free", up.http_host, up.http_port))
}

/// Asks the processor whether it would take its flags.
async fn settings(plan: &Plan) -> Result<String> {
    let spec = plan.spec(Part::Processor, Place::default())?;
    let (ok, said) = ask(&spec, "--print-config").await?;
    if !ok {
        bail!("the processor refuses its flags: {}", said.trim());
    }
    Ok("takes its flags".into())
}

fn enough(plan: &Plan, gpus: &Gpus) -> Result<String> {
    let needs = needs(plan);
    gpus.enough_for(&needs)?;
    let needed: usize = needs.iter().map(|(_, each)| each).sum();
    Ok(match gpus.count() {
        _ if plan.up.engine != Engine::Vllm => "none are needed".into(),
        _ if plan.up.share_gpus => "shared by all workers".into(),
        0 => "none are seen: engines use what they find".into(),
        count => format!("{needed} of {count} are needed"),
    })
}

/// Returns which workers need GPUs, and how many.
fn needs(plan: &Plan) -> Vec<(String, usize)> {
    let parts = plan.parts().into_iter();
    let needs = parts.map(|part| (part.to_string(), plan.gpus(part)));
    needs.filter(|(_, each)| *each > 0).collect()
}

/// Runs a planned program that only looks at something and ends.
///
/// - `question`: the flag that makes it do so.
/// - result: whether it is content, and what it printed.
pub(crate) async fn ask(spec: &Spec, question: &str) -> Result<(bool, String)> {
    asked(&spec.program, spec, question, PATIENCE).await
}

/// As [`ask`], for one that has reason to take its time.
pub(crate) async fn asked(
    program: &Path,
    spec: &Spec,
    question: &str,
    patience: Duration,
) -> Result<(bool, String)> {
    let mut command = Command::new(program);
    command
        .arg(question)
        .args(&spec.args)
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(patience, command.output())
        .await
        .with_context(|| format!("{question} has no answer after {patience:?}"))?
        .with_context(|| format!("run {}", program.display()))?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok((output.status.success(), said))
}
