//! The relay of a machine: tells processors what the KV caches of its engines hold.
//!
//! This file puts the parts together. What the relay does is in the library.

use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use stator_common::{drain, telemetry};
use stator_kv_relay::{
    config::{self, Cli},
    node::Node,
};
use tracing::info;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let config =
        config::load(&cli, |name| std::env::var(name).ok()).context("load configuration")?;
    if cli.print_config {
        print!("{}", config::to_toml(&config)?);
        return Ok(());
    }
    let telemetry = telemetry::init("kv-relay").context("start telemetry")?;
    let discovery = config
        .discovery()
        .await
        .context("open the place of discovery")?;
    let node = Node::bind(&config, discovery).await.context("bind")?;
    let at = node.relay().advertised(&config.host.to_string());
    info!(at = at.endpoint, "relay bound");
    // A relay has nothing to finish.
    drain::run(Duration::ZERO, |drain| node.serve(telemetry, drain)).await
}
