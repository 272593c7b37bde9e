//! `stator up`: start, wait until the model answers, watch, drain.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{self, Instant, MissedTickBehavior};

use crate::child::{self, Child, Line};
use crate::cli::{Engine, Up};
use crate::plan::{self, Layout};
use crate::ports;
use crate::probe::{Probe, Status};
use crate::state::{self, Process, Topology};
use crate::table::Table;

/// How often the table is refreshed: often enough to look alive, cheap enough to forget.
const REFRESH: Duration = Duration::from_millis(500);
/// Beyond the drain's own grace: what a processor needs to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);
/// The same for a worker, which itself gives its engine 10 s to end (`stator-engine`'s `shutdown`).
const WORKERS_GOODBYE: Duration = Duration::from_secs(15);
/// Lines of a dead child that the error repeats.
const LAST_WORDS: usize = 15;

/// Runs a topology until Ctrl-C or SIGTERM, or until one of its processes ends by itself.
///
/// # Errors
/// When a process cannot be started or ends by itself; the rest is drained before this returns.
pub(crate) async fn run(up: &Up) -> Result<()> {
    let Some(model) = up.positional_model.clone().or_else(|| up.model.clone()) else {
        bail!("which model? Name a folder or a Hugging Face id: stator up MODEL");
    };
    let dir = state::root(up.state_dir.as_deref())
        .context("open the state folder")?
        .join(&up.name);
    if let Some(running) = Topology::load(&dir) {
        bail!(
            "a topology named {:?} runs already (pid {}); stop it or give this one another --name",
            up.name,
            running.launcher_pid
        );
    }
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let bin = binaries()?;
    ports::check(&up.http_host, up.http_port)?;
    let system_ports = ports::free(plan::process_count(up)).context("find free ports")?;
    let layout = Layout {
        dir: &dir,
        bin: &bin,
        system_ports: &system_ports,
    };
    let mut interrupts = Interrupts::listen()?;
    let (lines, mut printed) = mpsc::channel(256);
    let mut running = Running::default();
    let specs = plan::processes(up, &model, &layout)?;
    let names: Vec<String> = specs.iter().map(|s| s.name.clone()).collect();
    for spec in specs {
        let child = Child::start(spec, &dir, lines.clone())?;
        running.children.push(child);
    }
    drop(lines);
    running
        .describe(up, &model)
        .save(&dir)
        .context("write the state file")?;

    let live = !up.plain && std::io::stdout().is_terminal();
    let mut table = Table::open(&names, live);
    table.print(&format!("logs: {}", dir.display()));
    if up.engine == Engine::Attach {
        table.print(&attach_hint(up, &model));
    }
    let outcome = running
        .watch(up, &mut table, &mut printed, &mut interrupts)
        .await;
    let drained = running
        .drain(up, &mut table, &mut printed, &mut interrupts)
        .await;
    table.close();
    Topology::remove(&dir);
    outcome.and(drained)
}

/// The children of a topology.
#[derive(Default)]
struct Running {
    children: Vec<Child>,
}

impl Running {
    fn describe(&self, up: &Up, model: &str) -> Topology {
        Topology {
            name: up.name.clone(),
            launcher_pid: std::process::id(),
            launcher_started: stator_common::process::start_of(std::process::id()),
            model: model.to_owned(),
            url: url(up),
            processes: self
                .children
                .iter()
                .map(|child| Process {
                    name: child.spec.name.clone(),
                    role: child.spec.role.to_owned(),
                    pid: child.pid(),
                    system_url: system_url(child),
                    log: child.log.clone(),
                })
                .collect(),
        }
    }

    /// Shows the topology until it shall end.
    ///
    /// # Errors
    /// When a child ended by itself.
    async fn watch(
        &mut self,
        up: &Up,
        table: &mut Table,
        printed: &mut mpsc::Receiver<Line>,
        interrupts: &mut Interrupts,
    ) -> Result<()> {
        let probe = Probe::new();
        let mut announced = false;
        let mut tick = time::interval(REFRESH);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = interrupts.next() => return Ok(()),
                Some(line) = printed.recv() => table.print(&format!("{} | {}", line.child, line.text)),
                _ = tick.tick() => {
                    self.check_alive().await?;
                    let statuses = self.statuses(&probe).await;
                    for (index, status) in statuses.iter().enumerate() {
                        table.update(index, status.as_ref());
                    }
                    if !announced && serves(&statuses) {
                        announced = true;
                        table.print(&greeting(up, &statuses));
                    }
                }
            }
        }
    }

    async fn statuses(&self, probe: &Probe) -> Vec<Option<Status>> {
        let urls: Vec<String> = self.children.iter().map(system_url).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for (index, url) in urls.into_iter().enumerate() {
            let probe = probe.clone();
            tasks.spawn(async move { (index, probe.status(&url).await) });
        }
        let mut statuses = vec![None; self.children.len()];
        while let Some(Ok((index, status))) = tasks.join_next().await {
            statuses[index] = status;
        }
        statuses
    }

    /// Fails when a child has ended by itself, with its last words.
    async fn check_alive(&mut self) -> Result<()> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "{} {}; its last lines ({}):\n{}",
                    child.spec.name,
                    child::describe(status),
                    child.log.display(),
                    last_lines(&child.log)
                );
            }
        }
        Ok(())
    }

    /// Drains the processor first, so that what runs can finish, then the workers.
    ///
    /// Each stage has a grace period of its own. Its end, or a second interrupt, kills what is left.
    async fn drain(
        &mut self,
        up: &Up,
        table: &mut Table,
        printed: &mut mpsc::Receiver<Line>,
        interrupts: &mut Interrupts,
    ) -> Result<()> {
        table.print("draining; a second Ctrl-C ends at once");
        let mut failed = Vec::new();
        let workers = self.children.split_off(1.min(self.children.len()));
        let stages = [
            (std::mem::take(&mut self.children), GOODBYE),
            (workers, WORKERS_GOODBYE),
        ];
        for (mut stage, goodbye) in stages {
            let deadline = Instant::now() + up.drain_grace + goodbye;
            for child in &stage {
                child.signal(Signal::SIGTERM);
            }
            let ended = async {
                for child in &mut stage {
                    match child.wait().await {
                        Ok(status) if status.success() => {}
                        Ok(status) => {
                            failed.push(format!("{} {}", child.spec.name, child::describe(status)));
                        }
                        Err(error) => failed.push(format!("{}: {error}", child.spec.name)),
                    }
                }
            };
            tokio::pin!(ended);
            let killed = loop {
                tokio::select! {
                    () = &mut ended => break false,
                    () = interrupts.next() => break true,
                    () = time::sleep_until(deadline) => break true,
                    Some(line) = printed.recv() => table.print(&format!("{} | {}", line.child, line.text)),
                }
            };
            if killed {
                bail!("killed what had not ended in time");
            }
        }
        if !failed.is_empty() {
            bail!("not a clean end: {}", failed.join("; "));
        }
        Ok(())
    }
}

/// Ctrl-C and SIGTERM, as events.
struct Interrupts {
    int: tokio::signal::unix::Signal,
    term: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn listen() -> Result<Interrupts> {
        Ok(Interrupts {
            int: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            term: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// Waits for the next one. Cancel safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}

/// Returns the folder of our binaries: the one that holds this program.
fn binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let dir = own.parent().context("this program has no parent folder")?;
    for name in ["stator-processor", "stator-agg"] {
        if !dir.join(name).exists() {
            bail!(
                "{name} is not beside {}; build or install all binaries together",
                own.display()
            );
        }
    }
    Ok(dir.to_path_buf())
}

fn system_url(child: &Child) -> String {
    format!("http://127.0.0.1:{}", child.spec.system_port)
}

fn url(up: &Up) -> String {
    let tls = up
        .processor_arg
        .iter()
        .any(|arg| arg.starts_with("--tls-cert"));
    let scheme = if tls { "https" } else { "http" };
    format!("{scheme}://{}:{}", up.http_host, up.http_port)
}

/// Says whether every process is ready and the processor has a model that answers.
fn serves(statuses: &[Option<Status>]) -> bool {
    let ready = statuses
        .iter()
        .all(|s| s.as_ref().is_some_and(Status::is_ready));
    ready && statuses[0].as_ref().is_some_and(|s| !s.models.is_empty())
}

fn greeting(up: &Up, statuses: &[Option<Status>]) -> String {
    let model = statuses[0]
        .as_ref()
        .and_then(|s| s.models.first().cloned())
        .unwrap_or_default();
    let key = if up.api_key.is_empty() && up.api_key_file.is_none() {
        ""
    } else {
        " -H \"Authorization: Bearer $STATOR_API_KEY\""
    };
    format!(
        "ready: {url}/v1 answers as model {model:?}. Try:\n  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
        url = url(up),
    )
}

fn attach_hint(up: &Up, model: &str) -> String {
    let mut text = String::from("waiting for engines; start each one with:");
    for i in 0..up.workers {
        text.push_str(&format!(
            "\n  vllm serve {model} --headless --data-parallel-address 127.0.0.1 --data-parallel-rpc-port {} --data-parallel-size-local 1",
            // The plan was laid out with the same ports.
            up.attach_port.saturating_add(i)
        ));
    }
    text
}

/// Returns the end of a log, without the stack that `RUST_BACKTRACE` adds to an error.
fn last_lines(log: &Path) -> String {
    let text = fs::read(log)
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default();
    let mut lines: Vec<&str> = text.trim_end().lines().collect();
    if let Some(stack) = lines.iter().rposition(|line| *line == "Stack backtrace:")
        && lines[stack + 1..].iter().all(|line| line.starts_with(' '))
    {
        lines.truncate(stack);
    }
    lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_child_are_not_its_stack() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let stack = format!("\nStack backtrace:\n{}", "   0: f\n".repeat(40));
        let error = "Error: bind\n\nCaused by:\n    taken\n";
        fs::write(log.path(), format!("{error}{stack}")).unwrap();
        assert_eq!(last_lines(log.path()), error);
        // That of an earlier run hides nothing.
        fs::write(log.path(), format!("{error}{stack}started\n")).unwrap();
        assert!(last_lines(log.path()).ends_with("f\nstarted"));
    }
}
