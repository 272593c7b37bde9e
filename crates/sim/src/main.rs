//! `stator-sim`: a simulated vLLM engine, started as a headless vLLM is.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Context as _;
use stator_sim::{Exit, Sim, cli};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

// One thread: an engine is a loop, and its neighbours on the machine are what is measured.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let Some(configs) = cli::parse(std::env::args().skip(1))? else {
        print!("{}", cli::HELP);
        return Ok(ExitCode::SUCCESS);
    };
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut engines: Vec<_> = configs.into_iter().map(Sim::spawn).collect();
    loop {
        let ended = futures::future::select_all(engines.iter_mut());
        tokio::select! {
            (exit, at, _) = ended => {
                let exit = exit.context("run the engine")?;
                drop(engines.remove(at));
                match exit {
                    Exit::Stopped if engines.is_empty() => return Ok(ExitCode::SUCCESS),
                    Exit::Stopped => {}
                    // One engine's end is the end of all, as under vLLM's process manager.
                    Exit::Dead(_) | Exit::Vanished => return Ok(ExitCode::FAILURE),
                }
            }
            _ = terminate.recv() => engines.iter().for_each(stator_sim::Handle::stop),
            _ = interrupt.recv() => engines.iter().for_each(stator_sim::Handle::stop),
        }
    }
}
