//! The processor: takes OpenAI requests and has workers answer them.
//!
//! This file puts the parts together. What the processor does is in the library.

use anyhow::Context;
use stator_common::{drain, telemetry};
use stator_processor::config::{self, Cli};
use stator_processor::{Processor, server};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::from_process();
    let config =
        config::load(&cli, |name| std::env::var(name).ok()).context("load configuration")?;
    if cli.print_config {
        print!("{}", config::to_toml(&config)?);
        return Ok(());
    }
    telemetry::init_logs().context("start logs")?;
    let grace = config.drain_grace;
    let discovery = server::discovery(&config);
    let processor = Processor::bind(config).await.context("bind")?;
    drain::run(grace, |drain| processor.serve(discovery, drain)).await
}
