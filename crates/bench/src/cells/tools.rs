//! What other tools can tell: system calls (strace) and where the time goes (perf).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

use super::{Bench, PACED, steady};
use crate::table::{Figure, What};
use crate::topology::Topology;

/// Samples a second: enough for a process that is mostly idle, and no burden for one that is not.
const SAMPLES: &str = "4999";

impl Bench {
    /// Counts system calls while streams run at an engine's pace.
    pub(super) async fn syscalls(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for (what, pids) in [
            (What::ProcessorSyscalls, topology.processor()),
            (What::WorkerSyscalls, topology.workers()),
        ] {
            let report = self.folder.join(format!("{what:?}.strace"));
            let mut command = Command::new("strace");
            command.args(["-f", "-c", "-S", "calls", "-o"]).arg(&report);
            for pid in pids {
                command.args(["-p", &pid.to_string()]);
            }
            let mut strace = command
                .stderr(Stdio::null())
                .spawn()
                .context("start strace")?;
            let window = self.options.window();
            let steady = steady::measure(&topology.address, &[], window, PACED).await?;
            interrupt(&mut strace)?;
            let text = std::fs::read_to_string(&report).context("read strace's report")?;
            let calls = total_calls(&text).context("read strace's report")?;
            let events = steady.rate * window.as_secs_f64();
            let most = text.lines().skip(2).take(4).filter_map(last_word);
            let note = format!("mostly {}", most.collect::<Vec<_>>().join(", "));
            figures.push(Figure::new(what, calls / events, note));
        }
        Ok(figures)
    }

    /// Starts perf on processor and workers, if profiles are wanted.
    pub(super) fn profile(&self, topology: &Topology, name: &str) -> anyhow::Result<Profiles> {
        let mut running = Vec::new();
        if let Some(folder) = &self.options.profile {
            std::fs::create_dir_all(folder).context("make a folder")?;
            for (role, pids) in [
                ("processor", topology.processor()),
                ("worker", topology.workers()),
            ] {
                let data = folder.join(format!("{role}-{name}.data"));
                let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
                let perf = Command::new("perf")
                    .args(["record", "-q", "-F", SAMPLES, "-p", &pids.join(","), "-o"])
                    .arg(&data)
                    .stderr(Stdio::null())
                    .spawn()
                    .context("start perf")?;
                running.push((perf, data));
            }
        }
        Ok(Profiles(running))
    }
}

/// Profiles that are being taken.
pub(super) struct Profiles(Vec<(Child, PathBuf)>);

impl Profiles {
    /// Ends them and writes down where the time went.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        for (mut perf, data) in self.0 {
            interrupt(&mut perf)?;
            report(&data)?;
        }
        Ok(())
    }
}

fn report(data: &Path) -> anyhow::Result<()> {
    let output = Command::new("perf")
        .args(["report", "--stdio", "--percent-limit", "0.3", "-i"])
        .arg(data)
        .output()
        .context("read a profile")?;
    std::fs::write(data.with_extension("txt"), output.stdout).context("write a profile")
}

/// Ends a child as Ctrl-C does, and waits for it.
fn interrupt(child: &mut Child) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).context("end a tool")?;
    child.wait().context("wait for a tool")?;
    Ok(())
}

/// The number of calls in the last line of strace's summary.
fn total_calls(text: &str) -> Option<f64> {
    let line = text.lines().rev().find(|line| line.ends_with("total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

fn last_word(line: &str) -> Option<&str> {
    line.split_whitespace().next_back()
}
