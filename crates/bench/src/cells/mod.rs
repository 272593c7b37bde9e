//! The measurements, one after the other.

mod load;
mod long;
mod steady;
mod tools;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::Options;
use crate::client::{Ask, Connection};
use crate::cpu::Cpu;
use crate::model;
use crate::prompts::Prompts;
use crate::table::{Figure, What};
use crate::topology::{Plan, Topology};
use crate::yardstick::Yardstick;

/// Connections of the measurements under load, and streams at a time.
pub(crate) const CONNECTIONS: usize = 16;

/// Words of a short prompt.
pub(crate) const SHORT: usize = 20;

/// A measurement is taken so many times, and the median counts: others use the machine, too.
const ROUNDS: u32 = 5;

/// Requests of the time-to-first-token measurement.
const FIRST_TOKENS: usize = 400;

/// Tokens of an answer in it.
const FIRST_TOKENS_LEN: usize = 20;

/// Tokens of a long answer, as in the measurements of others.
const LONG_ANSWER: usize = 256;

/// Engine steps of the paced measurements: a small model's on a large GPU, and a large model's.
const BRISK: Duration = Duration::from_millis(1);
const PACED: Duration = Duration::from_millis(20);

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

impl Bench {
    /// Finds the binaries and makes the model.
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
            let fast = ["--sim-speedup", "0", "--num-gpu-blocks-override", "40000"];
            let fast = self.start("fast", &fast).await?;
            figures.extend(self.requests(&fast).await?);
            figures.extend(self.long_answers(&fast).await?);
            figures.extend(self.first_tokens(&fast).await?);
            figures.extend(self.long_prompts(&fast).await?);
        }
        figures.extend(self.brisk().await?);
        figures.extend(self.paced().await?);
        figures.extend(self.yardstick().await?);
        compare(&mut figures);
        Ok(figures)
    }

    async fn start(&self, name: &str, engine: &[&str]) -> anyhow::Result<Topology> {
        Topology::start(&Plan {
            bin: &self.bin,
            model: &self.model,
            workers: self.options.workers,
            router: &self.options.router,
            request_plane: &self.options.request_plane,
            engine,
            folder: self.folder.join(name),
        })
        .await
    }

    /// A topology whose engine takes this long for a step, however much it does in it.
    async fn start_at(&self, name: &str, step: Duration) -> anyhow::Result<Topology> {
        let step = step.as_micros().to_string();
        let mut flags = vec!["--sim-decode-us-per-step", &step];
        flags.extend([
            "--sim-decode-us-per-seq",
            "0",
            "--sim-prefill-us-per-token",
            "0",
        ]);
        self.start(name, &flags).await
    }

    /// One token for twenty words, as fast as it goes.
    async fn requests(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        say("requests, 16 connections");
        load::run(&topology.address, 1, Duration::from_millis(500)).await?;
        let profiles = self.profile(topology, "request")?;
        let rounds = self.rounds(topology, 1).await?;
        profiles.finish()?;
        let each = |used: fn(&load::Round) -> Cpu| {
            median(rounds.iter().map(|r| used(r).micros_each(r.requests)))
        };
        let (processor, worker) = (each(|r| r.processor), each(|r| r.worker));
        let rate = median(
            rounds
                .iter()
                .map(|r| r.requests as f64 / r.took.as_secs_f64()),
        );
        let last = rounds[rounds.len() - 1];
        Ok(vec![
            Figure::new(What::ProcessorPerRequest, processor, kernel(last.processor)),
            Figure::new(What::WorkerPerRequest, worker, kernel(last.worker)),
            Figure::new(What::BothPerRequest, processor + worker, ""),
            Figure::new(What::RequestsPerSecond, rate, ""),
        ])
    }

    /// Long answers, as fast as they go. Several tokens share an event, as the engine is faster than any
    /// reader.
    async fn long_answers(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        say("tokens, no pace");
        let profiles = self.profile(topology, "token")?;
        let rounds = self.rounds(topology, LONG_ANSWER).await?;
        profiles.finish()?;
        let each = |used: fn(&load::Round) -> Cpu| {
            median(
                rounds
                    .iter()
                    .map(|r| used(r).micros_each(r.requests * LONG_ANSWER)),
            )
        };
        let tokens = |r: &load::Round| (r.requests * LONG_ANSWER) as f64;
        let rate = median(rounds.iter().map(|r| tokens(r) / r.took.as_secs_f64()));
        let shared = median(rounds.iter().map(|r| tokens(r) / r.events as f64));
        let note = format!("answers of {LONG_ANSWER}, {shared:.1} tokens per event");
        Ok(vec![
            Figure::new(What::ProcessorPerTokenFast, each(|r| r.processor), note),
            Figure::new(What::WorkerPerTokenFast, each(|r| r.worker), ""),
            Figure::new(What::TokensPerSecond, rate, ""),
        ])
    }

    async fn rounds(&self, topology: &Topology, tokens: usize) -> anyhow::Result<Vec<load::Round>> {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let window = self.options.window() / ROUNDS;
            rounds.push(load::Round::take(topology, tokens, window).await?);
        }
        Ok(rounds)
    }

    /// One request after the other on one connection.
    async fn first_tokens(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        say("time to first token");
        let mut prompts = Prompts::new(7);
        let mut connection = Connection::open(&topology.address).await?;
        let mut times = Vec::with_capacity(FIRST_TOKENS);
        let end = Instant::now() + self.options.window() * 2;
        while times.len() < FIRST_TOKENS && Instant::now() < end {
            let ask = Ask::completion(&prompts.text(SHORT), FIRST_TOKENS_LEN);
            times.push(connection.ask(&ask).await?.first);
            // Idle in between, so that nothing is still at work.
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        times.sort_unstable();
        let at = |share: f64| {
            let index = (times.len() as f64 * share) as usize;
            times[index.min(times.len() - 1)].as_secs_f64() * 1e3
        };
        let note = format!("{} requests of {FIRST_TOKENS_LEN} tokens", times.len());
        Ok(vec![
            Figure::new(What::FirstTokenMedian, at(0.5), note),
            Figure::new(What::FirstTokenTail, at(0.99), ""),
        ])
    }

    /// Streams before a fast engine: each step brings each stream one token.
    async fn brisk(&self) -> anyhow::Result<Vec<Figure>> {
        say("tokens, 1 ms steps");
        let topology = self.start_at("brisk", BRISK).await?;
        let pids = [topology.processor(), topology.workers()];
        let profiles = self.profile(&topology, "brisk")?;
        let steady =
            steady::measure(&topology.address, &pids, self.options.window(), BRISK).await?;
        profiles.finish()?;
        let per_second = format!("{:.0} events/s", steady.rate);
        Ok(vec![
            Figure::new(What::ProcessorPerTokenBrisk, steady.each[0], per_second),
            Figure::new(What::WorkerPerTokenBrisk, steady.each[1], ""),
        ])
    }

    /// Streams before a slow engine, where waking up costs more than working.
    async fn paced(&self) -> anyhow::Result<Vec<Figure>> {
        say("tokens, 20 ms steps");
        let topology = self.start_at("paced", PACED).await?;
        let pids = [topology.processor(), topology.workers()];
        let profiles = self.profile(&topology, "paced")?;
        let steady =
            steady::measure(&topology.address, &pids, self.options.window(), PACED).await?;
        profiles.finish()?;
        let [processor, worker] = [steady.each[0], steady.each[1]];
        let per_second = format!("{:.0} events/s", steady.rate);
        let mut figures = vec![
            Figure::new(What::ProcessorPerTokenPaced, processor, per_second),
            Figure::new(What::WorkerPerTokenPaced, worker, ""),
            Figure::new(What::BothPerTokenPaced, processor + worker, ""),
        ];
        if self.options.syscalls {
            say("system calls");
            figures.extend(self.syscalls(&topology).await?);
        }
        Ok(figures)
    }

    /// The same loads on a server that does nothing but HTTP.
    async fn yardstick(&self) -> anyhow::Result<Vec<Figure>> {
        say("a bare HTTP server");
        let window = self.options.window() / 2;
        let server = Yardstick::start(Duration::ZERO)?;
        let mut each = Vec::new();
        for _ in 0..ROUNDS {
            let before = Cpu::of(server.pid())?;
            let done = load::run(&server.address, 1, window / ROUNDS).await?;
            each.push(
                Cpu::of(server.pid())?
                    .since(before)
                    .micros_each(done.requests),
            );
        }
        let note = "reads the body, writes one event";
        let mut figures = vec![Figure::new(What::YardstickPerRequest, median(each), note)];
        for (what, step) in [
            (What::YardstickPerTokenBrisk, BRISK),
            (What::YardstickPerTokenPaced, PACED),
        ] {
            let server = Yardstick::start(step)?;
            let pids = [vec![server.pid()]];
            let steady = steady::measure(&server.address, &pids, window, step).await?;
            figures.push(Figure::new(what, steady.each[0], ""));
        }
        Ok(figures)
    }
}

/// Says how many times the bare server's cost a figure is: that depends less on the machine, and on who
/// else uses it, than the figure itself.
fn compare(figures: &mut [Figure]) {
    for (what, yardstick) in [
        (What::ProcessorPerRequest, What::YardstickPerRequest),
        (What::ProcessorPerTokenBrisk, What::YardstickPerTokenBrisk),
        (What::ProcessorPerTokenPaced, What::YardstickPerTokenPaced),
    ] {
        let value = |what| {
            figures
                .iter()
                .find(|figure| figure.what == what)
                .map(|f| f.value)
        };
        let Some(ratio) = value(what)
            .zip(value(yardstick))
            .map(|(value, bare)| value / bare)
        else {
            continue;
        };
        for figure in figures.iter_mut().filter(|figure| figure.what == what) {
            figure.note = format!("{ratio:.1} x bare HTTP; {}", figure.note);
        }
    }
}

/// The middle one.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn kernel(cpu: Cpu) -> String {
    format!("{:.0} % in the kernel", cpu.system_share() * 100.0)
}

fn say(what: &str) {
    eprintln!("measuring: {what}");
}
