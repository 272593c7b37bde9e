//! `stator doctor`: everything that `stator up` with the same flags would need, looked at without starting it.
//!
//! The launcher's own checks, and each worker's `--preflight`: packages of the engine's Python, its ports, GPU memory,
//! whether prefill and decode engines fit. Which those are is the workers' to know.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::checks::{self, Finding};
use crate::cli::Up;
use crate::cores;
use crate::gpus::Gpus;
use crate::plan::{Part, Place, Plan};
use crate::state;

/// Importing an engine's packages takes half a minute on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Stands for a model where none is named.
const NO_MODEL: &str = "MODEL";

/// Prints one report.
///
/// # Errors
/// When something is not as it should be.
pub(crate) async fn run(up: &Up) -> Result<()> {
    let dir = state::root(up.state_dir.as_deref())?.join(&up.name);
    let model = up.model().unwrap_or(NO_MODEL);
    let plan = match Plan::new(up, model, &dir, &checks::bin()?) {
        Ok(plan) => plan,
        Err(error) => return report(&[Finding::new("flags", Err(error))]),
    };
    let gpus = checks::gpus(&plan).await;
    let mut findings = vec![Finding::new("topology", Ok(describe(&plan)))];
    findings.extend(checks::all(&plan, &gpus).await);
    if up.model().is_none() {
        let left_out = "no MODEL is named, so workers were not asked".to_owned();
        findings.push(Finding::new("workers", Ok(left_out)));
    } else {
        findings.extend(workers(&plan, gpus).await);
    }
    report(&findings)
}

fn describe(plan: &Plan) -> String {
    let names: Vec<String> = plan.parts().iter().map(Part::to_string).collect();
    names.join(", ")
}

/// Asks the workers: each one, where each has GPUs of its own, else one of each role.
async fn workers(plan: &Plan, mut gpus: Gpus) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut seen = Vec::new();
    for (ordinal, part) in (0..).zip(plan.parts().into_iter().filter(|p| *p != Part::Processor)) {
        // Too few were complained about already.
        let own = gpus.take(&part.to_string(), plan.gpus(part));
        let own = own.unwrap_or_default();
        if seen.contains(&part.role()) && own.is_empty() {
            continue;
        }
        seen.push(part.role());
        let place = Place {
            system_port: 0,
            ordinal,
            gpus: own,
            in_bus_order: gpus.in_bus_order(),
            cores: cores::environment(&gpus, plan.devices()),
        };
        let found = preflight(plan, part, place).await;
        findings.push(Finding::new(part.to_string(), found));
    }
    findings
}

async fn preflight(plan: &Plan, part: Part, place: Place) -> Result<String> {
    let spec = plan.spec(part, place)?;
    let (ok, said) = checks::asked(&spec.program, &spec, "--preflight", PATIENCE).await?;
    let said = said.trim_end().to_owned();
    if ok { Ok(said) } else { bail!("{said}") }
}

/// Prints what was found.
fn report(findings: &[Finding]) -> Result<()> {
    let width = findings.iter().map(|f| f.what.len()).max().unwrap_or(0);
    for Finding { what, found } in findings {
        let (mark, text) = match found {
            Ok(text) => ("ok  ", text),
            Err(text) => ("FAIL", text),
        };
        let mut lines = text.lines();
        println!(
            "{mark}  {what:<width$}  {}",
            lines.next().unwrap_or_default()
        );
        for line in lines {
            println!("      {:<width$}  {line}", "");
        }
    }
    match findings.iter().filter(|f| f.found.is_err()).count() {
        0 => Ok(()),
        1 => bail!("1 thing is not as it should be"),
        wrong => bail!("{wrong} things are not as they should be"),
    }
}
