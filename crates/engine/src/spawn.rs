//! Starts vLLM as a headless child.

use std::{fs::File, io, net::SocketAddr, path::Path, process::Stdio};

use tokio::process::{Child, Command};

use crate::{config::Spawn, guard::Guard, process::Process};

/// A spawned engine.
pub(crate) struct Spawned {
    /// vLLM's launcher; the EngineCore is its child, in the same group.
    pub(crate) child: Child,
    pub(crate) process: Process,
    pub(crate) guard: Guard,
}

/// What makes a Python vLLM's launcher.
pub(crate) const VLLM: [&str; 2] = ["-m", "vllm.entrypoints.cli.main"];

/// The place of an engine among ranks that step together.
#[derive(Clone, Copy)]
pub(crate) struct Rank {
    pub(crate) number: u32,
    pub(crate) of: u32,
}

/// Starts an engine so that it dials `handshake`.
///
/// - `program`: what comes between the executable and `serve`.
/// - `log`: takes stdout and stderr, opened for appending.
///
/// Until it is ready it dies with this process, even if it is to be kept: an engine that nobody has a
/// record of would hold its GPU for ever.
///
/// The arguments after the caller's own exist unchanged in vLLM 0.23 to 0.33
/// (`vllm/entrypoints/cli/serve.py`, `run_headless`).
pub(crate) fn spawn(
    config: &Spawn,
    program: &[&str],
    rank: Option<Rank>,
    handshake: SocketAddr,
    log: &Path,
) -> io::Result<Spawned> {
    let out = crate::logtail::create(log)?;
    let mut command = command(config, program, handshake, out)?;
    if let Some(Rank { number, of }) = rank {
        command
            .args(["--data-parallel-size", &of.to_string()])
            .args(["--data-parallel-start-rank", &number.to_string()]);
    }
    let guard = Guard::spawn()?;
    guard.enlist(&mut command)?;
    let child = command.spawn()?;
    let pid = child.id().expect("nobody has waited for it");
    Ok(Spawned {
        process: Process::of_child(pid.cast_signed())?,
        child,
        guard,
    })
}

fn command(
    config: &Spawn,
    program: &[&str],
    handshake: SocketAddr,
    out: File,
) -> io::Result<Command> {
    let mut command = Command::new(&config.python);
    command
        .args(program)
        .args(["serve", &config.model])
        .args(&config.args)
        .arg("--headless")
        .args(["--data-parallel-address", &handshake.ip().to_string()])
        .args(["--data-parallel-rpc-port", &handshake.port().to_string()])
        .args(["--data-parallel-size-local", "1"])
        // Without its byte code vLLM compiles itself anew at every start, for half a minute.
        .env_remove("PYTHONDONTWRITEBYTECODE")
        // The log is a file; its lines should not wait for a full buffer.
        .env("PYTHONUNBUFFERED", "1")
        .envs(config.env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stderr(out.try_clone()?)
        .stdout(out);
    Ok(command)
}
