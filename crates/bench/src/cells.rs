//! The measurements, one after the other.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures::future::try_join_all;

use crate::Options;
use crate::client::{Connection, body};
use crate::cpu::Cpu;
use crate::model;
use crate::prompts::Prompts;
use crate::table::{Figure, What};
use crate::topology::{Plan, Topology};

/// Connections of the measurements under load, and streams at a time.
const CONNECTIONS: usize = 16;

/// Words of a short prompt.
const SHORT: usize = 20;

/// Tokens of a long prompt, about.
const LONG_TOKENS: usize = 60_000;

/// Requests of the time-to-first-token measurement.
const FIRST_TOKENS: usize = 400;

/// Tokens of an answer in it.
const FIRST_TOKENS_LEN: usize = 20;

/// A step of the engine in the paced measurement, in microseconds.
const PACE_US: usize = 20_000;

/// Everything that the measurements share.
#[derive(Debug)]
pub(crate) struct Bench {
    options: Options,
    bin: PathBuf,
    model: PathBuf,
    folder: PathBuf,
    /// Removes the folder in the end, unless it was asked for.
    _temporary: tempfile::TempDir,
}

/// What a load brought.
#[derive(Clone, Copy, Debug)]
struct Load {
    requests: usize,
    events: usize,
    took: Duration,
    processor: Cpu,
    worker: Cpu,
}

impl Bench {
    pub(crate) fn new(options: Options) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let bin = match &options.bin_dir {
            Some(dir) => dir.clone(),
            None => own.parent().context("find this program")?.to_owned(),
        };
        let temporary = tempfile::tempdir().context("make a temporary folder")?;
        let folder = options
            .logs
            .clone()
            .unwrap_or_else(|| temporary.path().to_owned());
        let model = match &options.model {
            Some(model) => model.clone(),
            None => {
                let model = temporary.path().join("model");
                std::fs::create_dir_all(&model).context("make a folder")?;
                model::make(&model)?;
                model
            }
        };
        Ok(Self {
            options,
            bin,
            model,
            folder,
            _temporary: temporary,
        })
    }

    /// Takes all measurements.
    pub(crate) async fn run(self) -> anyhow::Result<Vec<Figure>> {
        let mut figures = Vec::new();
        {
            let fast = self
                .start(
                    "fast",
                    &["--sim-speedup", "0", "--num-gpu-blocks-override", "40000"],
                )
                .await?;
            say("requests, 16 connections");
            figures.extend(self.requests(&fast).await?);
            say("tokens, no pace");
            figures.extend(self.tokens_fast(&fast).await?);
            say("time to first token");
            figures.extend(self.first_tokens(&fast).await?);
            say("prompts of 60k tokens");
            figures.extend(self.long_prompts(&fast).await?);
        }
        {
            let pace = PACE_US.to_string();
            let paced = self
                .start(
                    "paced",
                    &[
                        "--sim-decode-us-per-step",
                        &pace,
                        "--sim-decode-us-per-seq",
                        "0",
                        "--sim-prefill-us-per-token",
                        "0",
                    ],
                )
                .await?;
            say("tokens, 20 ms steps");
            figures.extend(self.tokens_paced(&paced).await?);
            if self.options.syscalls {
                say("system calls");
                figures.extend(self.syscalls(&paced).await?);
            }
        }
        say("the bare HTTP server");
        figures.extend(self.yardstick().await?);
        eprintln!();
        Ok(figures)
    }

    async fn start(&self, name: &str, engine: &[&str]) -> anyhow::Result<Topology> {
        Topology::start(&Plan {
            bin: &self.bin,
            model: &self.model,
            workers: self.options.workers,
            router: &self.options.router,
            engine,
            folder: self.folder.join(name),
        })
        .await
    }

    /// One token for twenty words, as fast as it goes.
    async fn requests(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        self.load(topology, 1, Duration::from_millis(500)).await?;
        let profiles = self.profile(topology, "request")?;
        let load = self.load(topology, 1, self.options.window()).await?;
        profiles.finish()?;
        let each = |cpu: Cpu| cpu.micros_each(load.requests);
        let both = each(load.processor) + each(load.worker);
        let rate = load.requests as f64 / load.took.as_secs_f64();
        Ok(vec![
            Figure::new(
                What::ProcessorPerRequest,
                each(load.processor),
                kernel(load.processor),
            ),
            Figure::new(
                What::WorkerPerRequest,
                each(load.worker),
                kernel(load.worker),
            ),
            Figure::new(What::BothPerRequest, both, ""),
            Figure::new(
                What::RequestsPerSecond,
                rate,
                format!("{} requests", load.requests),
            ),
        ])
    }

    /// Long answers, as fast as they go.
    async fn tokens_fast(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        const TOKENS: usize = 256;
        let profiles = self.profile(topology, "token")?;
        let load = self.load(topology, TOKENS, self.options.window()).await?;
        profiles.finish()?;
        let tokens = load.requests * TOKENS;
        let rate = tokens as f64 / load.took.as_secs_f64();
        let note = format!(
            "{}, answers of {TOKENS}, requests included",
            kernel(load.processor)
        );
        Ok(vec![
            Figure::new(
                What::ProcessorPerTokenFast,
                load.processor.micros_each(tokens),
                note,
            ),
            Figure::new(
                What::WorkerPerTokenFast,
                load.worker.micros_each(tokens),
                kernel(load.worker),
            ),
            Figure::new(
                What::TokensPerSecond,
                rate,
                format!(
                    "{:.2} tokens per event",
                    tokens as f64 / load.events.max(1) as f64
                ),
            ),
        ])
    }

    /// Streams at an engine's pace: each step brings each stream one token.
    async fn tokens_paced(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        let tokens_each = self.paced_tokens();
        let load = self.load(topology, tokens_each, Duration::ZERO).await?;
        let tokens = load.requests * tokens_each;
        let each = |cpu: Cpu| cpu.micros_each(tokens);
        let note = format!("{}, {CONNECTIONS} streams", kernel(load.processor));
        Ok(vec![
            Figure::new(What::ProcessorPerTokenPaced, each(load.processor), note),
            Figure::new(
                What::WorkerPerTokenPaced,
                each(load.worker),
                kernel(load.worker),
            ),
            Figure::new(
                What::BothPerTokenPaced,
                each(load.processor) + each(load.worker),
                "",
            ),
        ])
    }

    fn paced_tokens(&self) -> usize {
        (self.options.window().as_micros() as usize / PACE_US).max(10)
    }

    /// One request after the other on one connection.
    async fn first_tokens(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        let mut prompts = Prompts::new(7);
        let mut connection = Connection::open(&topology.address).await?;
        let mut times = Vec::with_capacity(FIRST_TOKENS);
        let end = Instant::now() + self.options.window() * 2;
        while times.len() < FIRST_TOKENS && Instant::now() < end {
            let body = body(&prompts.text(SHORT), FIRST_TOKENS_LEN, true);
            times.push(connection.ask(&body).await?.first);
            // Idle in between, so that nothing is still at work.
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        times.sort_unstable();
        let at = |share: f64| {
            let index = (times.len() as f64 * share) as usize;
            times[index.min(times.len() - 1)].as_secs_f64() * 1e3
        };
        let note = format!(
            "{} requests of {FIRST_TOKENS_LEN} tokens, one connection",
            times.len()
        );
        Ok(vec![
            Figure::new(What::FirstTokenMedian, at(0.5), note),
            Figure::new(What::FirstTokenTail, at(0.99), ""),
        ])
    }

    /// Prompts that take long to tokenize: new ones, and ones that begin as an earlier one did.
    async fn long_prompts(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        let mut prompts = Prompts::new(11);
        let words = (LONG_TOKENS as f64 / model::tokens_per_word(&self.model)?) as usize;
        let common = prompts.text(words);
        // Made before they are needed, so that making them takes no CPU from what is measured.
        let new: Vec<Bytes> = (0..16)
            .map(|index| body(&format!("{index} {}", prompts.text(words)), 1, true))
            .collect();
        let again: Vec<Bytes> = (0..200)
            .map(|_| body(&format!("{common} {}", prompts.text(SHORT)), 1, true))
            .collect();
        let before = Cpu::of_all(&topology.processor())?;
        let (new_rate, count) = self.send_all(topology, &new).await?;
        let cpu = Cpu::of_all(&topology.processor())?.since(before);
        let before = Cpu::of_all(&topology.processor())?;
        let (again_rate, again_count) = self.send_all(topology, &again).await?;
        let again_cpu = Cpu::of_all(&topology.processor())?.since(before);
        let kib = new[0].len() / 1024;
        Ok(vec![
            Figure::new(
                What::LongPrompts,
                new_rate,
                format!("{count} prompts of {kib} KiB"),
            ),
            Figure::new(What::LongPromptCpu, cpu.micros_each(count), kernel(cpu)),
            Figure::new(
                What::LongConversation,
                again_rate,
                format!(
                    "{again_count} prompts, {:.0} us of processor CPU each",
                    again_cpu.micros_each(again_count)
                ),
            ),
        ])
    }

    /// Sends each body once, four at a time; how many a second were answered, and how many at all.
    async fn send_all(
        &self,
        topology: &Topology,
        bodies: &[Bytes],
    ) -> anyhow::Result<(f64, usize)> {
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let end = start + self.options.window();
        let senders = (0..4).map(|_| {
            let next = next.clone();
            async move {
                let mut connection = Connection::open(&topology.address).await?;
                let mut answered = 0;
                while Instant::now() < end
                    && let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    connection.ask(body).await?;
                    answered += 1;
                }
                anyhow::Ok(answered)
            }
        });
        let answered: usize = try_join_all(senders).await?.into_iter().sum();
        Ok((answered as f64 / start.elapsed().as_secs_f64(), answered))
    }

    /// Asks on all connections for a time, each for one answer at least.
    async fn load(
        &self,
        topology: &Topology,
        tokens: usize,
        window: Duration,
    ) -> anyhow::Result<Load> {
        let processor = Cpu::of_all(&topology.processor())?;
        let worker = Cpu::of_all(&topology.workers())?;
        let start = Instant::now();
        let (requests, events) = ask_for(&topology.address, tokens, window).await?;
        let took = start.elapsed();
        ensure!(events > 0, "nothing was answered");
        Ok(Load {
            requests,
            events,
            took,
            processor: Cpu::of_all(&topology.processor())?.since(processor),
            worker: Cpu::of_all(&topology.workers())?.since(worker),
        })
    }

    /// The same loads on a server that does nothing but HTTP.
    async fn yardstick(&self) -> anyhow::Result<Vec<Figure>> {
        let own = std::env::current_exe().context("find this program")?;
        let mut child = Command::new(own)
            .arg("yardstick")
            .stdout(Stdio::piped())
            .spawn()
            .context("start the bare HTTP server")?;
        let mut address = String::new();
        let stdout = child.stdout.take().context("start the bare HTTP server")?;
        let measured = async {
            BufReader::new(stdout)
                .read_line(&mut address)
                .context("read its address")?;
            let address = address.trim();
            let window = self.options.window() / 3;
            let mut each = Vec::new();
            for tokens in [1, 256] {
                let before = Cpu::of(child.id())?;
                let (requests, _) = ask_for(address, tokens, window).await?;
                let used = Cpu::of(child.id())?.since(before);
                each.push(used.micros_each(requests * tokens));
            }
            anyhow::Ok(each)
        };
        let measured = measured.await;
        let _ = child.kill();
        let _ = child.wait();
        let each = measured?;
        Ok(vec![
            Figure::new(
                What::YardstickPerRequest,
                each[0],
                "reads the body, answers one event",
            ),
            Figure::new(
                What::YardstickPerToken,
                each[1],
                "writes one event at a time",
            ),
        ])
    }

    /// Counts system calls while streams run at an engine's pace.
    async fn syscalls(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        let tokens_each = self.paced_tokens();
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
            let (requests, _) = ask_for(&topology.address, tokens_each, Duration::ZERO).await?;
            interrupt(&mut strace)?;
            let text = std::fs::read_to_string(&report).context("read strace's report")?;
            let calls = total_calls(&text).context("read strace's report")?;
            let most: Vec<&str> = text.lines().skip(2).take(4).filter_map(last_word).collect();
            let tokens = requests * tokens_each;
            let note = format!("mostly {}", most.join(", "));
            figures.push(Figure::new(what, calls / tokens as f64, note));
        }
        Ok(figures)
    }

    /// Starts perf on processor and workers, if profiles are wanted.
    fn profile(&self, topology: &Topology, name: &str) -> anyhow::Result<Profiles> {
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
                    .args(["record", "-q", "-F", "999", "-p", &pids.join(","), "-o"])
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
struct Profiles(Vec<(std::process::Child, PathBuf)>);

impl Profiles {
    /// Ends them and writes down where the time went.
    fn finish(self) -> anyhow::Result<()> {
        for (mut perf, data) in self.0 {
            interrupt(&mut perf)?;
            report(&data)?;
        }
        Ok(())
    }
}

fn report(data: &Path) -> anyhow::Result<()> {
    let output = Command::new("perf")
        .args([
            "report",
            "--stdio",
            "-g",
            "none",
            "--percent-limit",
            "0.3",
            "-i",
        ])
        .arg(data)
        .output()
        .context("read a profile")?;
    std::fs::write(data.with_extension("txt"), output.stdout).context("write a profile")
}

/// Ends a child as Ctrl-C does, and waits for it.
fn interrupt(child: &mut std::process::Child) -> anyhow::Result<()> {
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

/// Keeps all connections busy for a time, each with one request at least, every prompt a new one. How
/// many were answered, with how many events.
async fn ask_for(address: &str, tokens: usize, window: Duration) -> anyhow::Result<(usize, usize)> {
    let end = Instant::now() + window;
    let connections = (0..CONNECTIONS).map(|index| async move {
        let mut prompts = Prompts::new(100 + index as u64);
        let mut connection = Connection::open(address).await?;
        let (mut requests, mut events) = (0, 0);
        while requests == 0 || Instant::now() < end {
            let body = body(&prompts.text(SHORT), tokens, true);
            events += connection.ask(&body).await?.events;
            requests += 1;
        }
        anyhow::Ok((requests, events))
    });
    let all = try_join_all(connections).await?;
    Ok(all
        .into_iter()
        .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)))
}

fn kernel(cpu: Cpu) -> String {
    format!("{:.0} % in the kernel", cpu.system_share() * 100.0)
}

fn say(what: &str) {
    eprint!("{what} .. ");
}
