//! The body of every worker role's `main`.

use std::{process::ExitCode, sync::Arc};

use anyhow::{Context, bail};
use stator_common::{card::Role, drain, telemetry};
use stator_engine::HandOff;
use tracing::{error, info, warn};

use crate::{
    Plan, Worker, cli, config, dump, headless,
    preflight::{self, Finding, Severity},
    worker,
};

/// Runs a worker from the command line and the environment to its end.
///
/// - `plan`: makes what the role does to requests, from the connector that hands KV on. Prefill and
///   decode roles always have one.
///
/// # Errors
/// The configuration is refused, a listener cannot be bound, or the engine cannot be started.
pub async fn run<P: Plan>(
    role: Role,
    plan: impl FnOnce(Option<HandOff>) -> anyhow::Result<P>,
) -> anyhow::Result<ExitCode> {
    let argv: Vec<_> = std::env::args_os().collect();
    let environment = |name: &str| std::env::var(name).ok();
    let cli = match cli::parse(role, &argv, &environment) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let config = config::load(&cli, role, &environment).context("load configuration")?;
    if let Some(path) = &cli.dump_config_to {
        dump::write(path, &config, role).with_context(|| format!("write {}", path.display()))?;
    }
    if cli.print_config {
        print!("{}", config::to_toml(&dump::shown(&config))?);
        return Ok(ExitCode::SUCCESS);
    }
    if cli.preflight {
        let findings = if config.headless {
            preflight::node(&config, role).await
        } else {
            worker::preflight(&config, role).await?
        };
        for finding in &findings {
            println!("{finding}");
        }
        return Ok(ExitCode::from(u8::from(preflight::is_fatal(&findings))));
    }
    let telemetry = telemetry::init(name(role)).context("start telemetry")?;
    for renamed in &cli.deprecated {
        warn!("{} is called {} now", renamed.old, renamed.new);
    }
    let grace = config.drain_grace;
    if config.headless {
        tell(&preflight::node(&config, role).await)?;
        drain::run(grace, |drain| headless::run(&config, role, drain)).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = plan(config.handoff(role)?)?;
    // Its future is large, and needed once.
    let worker = Box::pin(Worker::bind(config, role, Arc::new(plan), telemetry));
    let worker = worker.await.context("bind")?;
    info!(addr = %worker.address(), role = name(role), "worker bound");
    tell(&worker.preflight().await)?;
    drain::run(grace, |drain| worker.serve(drain)).await?;
    Ok(ExitCode::SUCCESS)
}

/// Says what is not as it should be.
///
/// # Errors
/// The worker could not serve.
fn tell(findings: &[Finding]) -> anyhow::Result<()> {
    for Finding {
        severity,
        about,
        found,
        remedy,
    } in findings
    {
        match severity {
            Severity::Fine => {}
            Severity::Warning => warn!(about, remedy, "{found}"),
            Severity::Error => error!(about, remedy, "{found}"),
        }
    }
    if preflight::is_fatal(findings) {
        bail!("this worker could not serve; --preflight shows all that was looked at");
    }
    Ok(())
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Agg => "agg",
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Encode => "encode",
    }
}
