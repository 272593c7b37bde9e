//! `stator`: starts a whole serving topology on this machine, shows it, and drains it.
//!
//! The launcher starts the same binaries that a cluster runs, as child processes, with the same
//! flags that a person would type. It carries no request and decides nothing about one.

mod checks;
mod child;
mod cli;
mod control;
mod cores;
mod doctor;
mod down;
mod fleet;
mod gpus;
mod greeting;
mod plan;
mod ports;
mod probe;
mod scale;
mod state;
mod status;
mod table;
mod up;
mod worker;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};

// One thread: children die with the thread that started them (PR_SET_PDEATHSIG), so that thread must live as long as the launcher.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Up(args) => up::run(&args).await,
        Command::Status(args) => status::run(&args).await,
        Command::Scale(args) => scale::run(&args).await,
        Command::Down(args) => down::run(&args).await,
        Command::Doctor(args) => doctor::run(&args).await,
        Command::Worker(args) => worker::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "stator", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
