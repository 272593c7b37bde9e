//! The aggregated worker: prefill and decode in one engine.
//!
//! This file puts the parts together. What the worker does is in the library.

use anyhow::Context;
use stator_common::{card::Role, drain, telemetry};
use stator_worker::{Worker, cli, config};
use tracing::info;

/// Tokens pass in small allocations; with the system's allocator they are a good part of a request's cost.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

// One thread carries some hundred thousand tokens per second, more than engines give; others would only
// be woken up for nothing.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let argv: Vec<_> = std::env::args_os().collect();
    let environment = |name: &str| std::env::var(name).ok();
    let cli = match cli::parse(&argv, &environment) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let config = config::load(&cli, &environment).context("load configuration")?;
    if cli.print_config {
        print!("{}", config::to_toml(&config)?);
        return Ok(());
    }
    let telemetry = telemetry::init("agg").context("start telemetry")?;
    let grace = config.drain_grace;
    let worker = Worker::bind(config, Role::Agg, telemetry)
        .await
        .context("bind")?;
    info!(addr = %worker.addr(), "aggregated worker bound");
    drain::run(grace, |drain| worker.serve(drain)).await
}
