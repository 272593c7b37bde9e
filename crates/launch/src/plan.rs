//! From the command line to the processes to start: pure, so that a test can read the result.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cli::{Engine, Up};

/// One process to start.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Unique in the topology, and the name of its log: `processor`, `agg-0`, ...
    pub(crate) name: String,
    pub(crate) role: &'static str,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Secrets go here and not into `args`, which every user of the machine can read.
    pub(crate) env: Vec<(&'static str, OsString)>,
    /// Port of its health, status and metrics routes, on loopback.
    pub(crate) system_port: u16,
}

/// Where a topology's processes find each other and keep their files.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    /// The topology's own folder.
    pub(crate) dir: &'a Path,
    /// The folder with the other binaries.
    pub(crate) bin: &'a Path,
    /// One free port per process: the processor's first, then the workers'.
    pub(crate) system_ports: &'a [u16],
}

/// Returns how many processes `up` starts.
pub(crate) fn process_count(up: &Up) -> usize {
    1 + usize::from(up.workers)
}

/// Lays out the processor and `up.workers` aggregated workers.
///
/// # Errors
/// There are not enough ports for engines to attach at.
pub(crate) fn processes(up: &Up, model: &str, layout: &Layout<'_>) -> Result<Vec<Spec>> {
    let mut all = vec![processor(up, layout)];
    for index in 0..up.workers {
        all.push(agg(up, model, layout, index)?);
    }
    Ok(all)
}

fn processor(up: &Up, layout: &Layout<'_>) -> Spec {
    let system_port = layout.system_ports[0];
    let mut args = common_args(up, layout, system_port);
    push(&mut args, "--http-host", &up.http_host);
    push(&mut args, "--http-port", up.http_port.to_string());
    push(&mut args, "--router-mode", &up.router);
    if let Some(file) = &up.api_key_file {
        push(&mut args, "--api-key-file", file);
    }
    args.extend(up.processor_arg.iter().map(OsString::from));
    let mut env = Vec::new();
    if !up.api_key.is_empty() {
        env.push(("STATOR_API_KEY", up.api_key.join(",").into()));
    }
    Spec {
        name: "processor".into(),
        role: "processor",
        program: layout.bin.join("stator-processor"),
        args,
        env,
        system_port,
    }
}

fn agg(up: &Up, model: &str, layout: &Layout<'_>, index: u16) -> Result<Spec> {
    let name = format!("agg-{index}");
    let system_port = layout.system_ports[1 + usize::from(index)];
    let mut args = common_args(up, layout, system_port);
    push(&mut args, "--model", model);
    for served in &up.served_model_name {
        push(&mut args, "--served-model-name", served);
    }
    push(&mut args, "--run-dir", layout.dir.join(&name));
    match up.engine {
        Engine::Vllm | Engine::Sim => push(&mut args, "--engine", up.engine.as_flag()),
        Engine::Attach => {
            let port = up.attach_port.checked_add(index).with_context(|| {
                format!(
                    "--attach-port {} leaves no port for worker {index} of {}",
                    up.attach_port, up.workers
                )
            })?;
            push(
                &mut args,
                "--engine-attach",
                format!("tcp://127.0.0.1:{port}"),
            );
        }
    }
    if up.engine_keep {
        args.push("--engine-keep".into());
    }
    args.extend(up.worker_args.iter().map(OsString::from));
    Ok(Spec {
        name,
        role: "agg",
        program: layout.bin.join("stator-agg"),
        args,
        env: Vec::new(),
        system_port,
    })
}

fn common_args(up: &Up, layout: &Layout<'_>, system_port: u16) -> Vec<OsString> {
    let mut args = Vec::new();
    push(&mut args, "--discovery-backend", "file");
    push(&mut args, "--discovery-path", layout.dir.join("discovery"));
    push(&mut args, "--system-port", system_port.to_string());
    push(
        &mut args,
        "--drain-grace",
        format!("{}ms", up.drain_grace.as_millis()),
    );
    args
}

fn push(args: &mut Vec<OsString>, flag: &str, value: impl Into<OsString>) {
    args.push(flag.into());
    args.push(value.into());
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn plan(line: &str) -> Vec<Spec> {
        try_plan(line).unwrap()
    }

    fn try_plan(line: &str) -> Result<Vec<Spec>> {
        let Command::Up(up) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
            panic!("not `up`: {line}");
        };
        let ports: Vec<u16> = (1..).take(process_count(&up)).collect();
        let layout = Layout {
            dir: Path::new("/t"),
            bin: Path::new("/b"),
            system_ports: &ports,
        };
        processes(&up, "m", &layout)
    }

    fn line(spec: &Spec) -> String {
        let args: Vec<_> = spec.args.iter().map(|a| a.to_string_lossy()).collect();
        args.join(" ")
    }

    #[test]
    fn workers_get_own_folders_and_ports_and_the_engine_flags_verbatim() {
        let all = plan("stator up m --workers 2 --engine sim -- --max-model-len 64 -O3");
        assert_eq!(all.len(), 3);
        assert!(line(&all[1]).contains("--system-port 2"));
        assert!(line(&all[1]).contains("--run-dir /t/agg-0"));
        assert!(line(&all[2]).contains("--run-dir /t/agg-1"));
        assert!(line(&all[2]).ends_with("--engine sim --max-model-len 64 -O3"));
    }

    #[test]
    fn keys_never_stand_on_a_command_line() {
        let all = plan("stator up m --api-key s3cret --api-key other");
        assert!(all.iter().all(|spec| !line(spec).contains("s3cret")));
        assert!(
            all[0]
                .env
                .contains(&("STATOR_API_KEY", "s3cret,other".into()))
        );
        assert!(all[1].env.iter().all(|(name, _)| *name != "STATOR_API_KEY"));
    }

    #[test]
    fn attached_engines_dial_one_port_per_worker() {
        let all = plan("stator up m --workers 2 --engine attach --attach-port 4000");
        assert!(line(&all[2]).contains("--engine-attach tcp://127.0.0.1:4001"));
        let error = try_plan("stator up m --workers 2 --engine attach --attach-port 65535");
        assert!(error.unwrap_err().to_string().contains("65535"));
    }
}
