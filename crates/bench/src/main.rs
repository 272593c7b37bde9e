//! `stator-bench`: what the serving layer costs, on the simulated engine, over loopback.
//!
//! It starts the real binaries, is their client itself, and reads how much CPU each of them used; so
//! what the client costs does not count. Next to each figure stand the one to hold and the
//! incumbents'. A bare HTTP server answers the same requests in the same run: times depend on the machine,
//! the ratio to it much less.

mod cells;
mod client;
mod cpu;
mod model;
mod prompts;
mod table;
mod topology;
mod trace;
mod yardstick;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::cells::Bench;

/// Measures the CPU that processor and worker take per request and per token, and the time that they add.
#[derive(Debug, Parser)]
#[command(name = "stator-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The bare HTTP server that the others are compared with.
    #[command(hide = true)]
    Yardstick {
        /// Microseconds between two events of a stream.
        pace: u64,
    },
    /// Simulates fleets and prints what each way of routing gives.
    Trace(trace::Options),
}

/// How to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder with stator-processor, stator-agg and stator-sim [default: this program's].
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,

    /// Model folder for tokenizer and configuration [default: one made on the spot, 8k tokens].
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,

    /// Workers, each with an engine of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) workers: u16,

    /// How the processor chooses among them.
    #[arg(long, value_name = "MODE", default_value = "round-robin")]
    pub(crate) router: String,

    /// How requests come to workers: tcp or http.
    #[arg(long, value_name = "PLANE", default_value = "tcp")]
    pub(crate) request_plane: String,

    /// Seconds per measurement.
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    pub(crate) seconds: f64,

    /// Counts system calls per token, with strace; the other figures are taken without it.
    #[arg(long)]
    pub(crate) syscalls: bool,

    /// Takes profiles of processor and worker with perf and writes what they show into this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) profile: Option<PathBuf>,

    /// Writes the figures as JSON, too.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Keeps the logs of what it started in this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) logs: Option<PathBuf>,
}

impl Options {
    pub(crate) fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.clamp(0.2, 600.0))
    }
}

// The client gets by with one thread, so that on a small machine the others have the rest.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Yardstick { pace }) => {
            return yardstick::serve(Duration::from_micros(pace)).await;
        }
        Some(Command::Trace(options)) => {
            trace::run(&options);
            return Ok(());
        }
        None => {}
    }
    let json = cli.options.json.clone();
    let figures = tokio::select! {
        figures = Bench::new(cli.options)?.run() => figures?,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
    };
    print!("{}", table::render(&figures));
    if let Some(file) = json {
        std::fs::write(&file, table::json(&figures)).context("write the figures")?;
    }
    Ok(())
}
