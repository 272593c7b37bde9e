//! The body of every worker role's `main`.

use std::sync::Arc;

use anyhow::Context;
use stator_common::{card::Role, drain, telemetry};
use stator_engine::HandOff;
use tracing::info;

use crate::{Plan, Worker, cli, config};

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
) -> anyhow::Result<()> {
    let argv: Vec<_> = std::env::args_os().collect();
    let environment = |name: &str| std::env::var(name).ok();
    let cli = match cli::parse(role, &argv, &environment) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let config = config::load(&cli, role, &environment).context("load configuration")?;
    if cli.print_config {
        print!("{}", config::to_toml(&config)?);
        return Ok(());
    }
    let telemetry = telemetry::init(name(role)).context("start telemetry")?;
    let grace = config.drain_grace;
    let plan = plan(config.handoff(role)?)?;
    let worker = Worker::bind(config, role, Arc::new(plan), telemetry)
        .await
        .context("bind")?;
    info!(addr = %worker.addr(), role = name(role), "worker bound");
    drain::run(grace, |drain| worker.serve(drain)).await
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Agg => "agg",
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Encode => "encode",
    }
}
