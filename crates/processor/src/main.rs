//! The processor: takes OpenAI requests and has workers answer them.
//!
//! This file puts the parts together. What the processor does is in the library.

use std::ffi::OsString;
use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::Context;
use stator_common::{drain, settings::deprecated, telemetry};
use stator_processor::config::{self, Cli, Config};
use stator_processor::{Processor, server};
use tokio::runtime::{self, Runtime};
use tracing::warn;

/// A request makes some hundred small allocations; with the system's allocator they are a third of its cost.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Cores per thread that serves connections, unless configured.
const CORES_PER_THREAD: usize = 8;
/// Threads for long prompts, at most. Each thread that tokenizes keeps the words it met, up to about 100 MB,
/// and takes a few milliseconds for a prompt of 60,000 tokens.
const LONG_PROMPT_THREADS: usize = 8;
/// How long such a thread keeps its words without work.
const KEEP_ALIVE: Duration = Duration::from_secs(300);

fn main() -> anyhow::Result<()> {
    let cli = Cli::from_process();
    let config =
        config::load(&cli, |name| std::env::var(name).ok()).context("load configuration")?;
    if cli.print_config {
        print!("{}", config::to_toml(&config)?);
        return Ok(());
    }
    tokenize_each_prompt_on_one_thread();
    telemetry::init_logs().context("start logs")?;
    let line: Vec<OsString> = std::env::args_os().skip(1).collect();
    for renamed in deprecated::used(&line, |name| std::env::var(name).ok()) {
        warn!("{} is called {} now", renamed.old, renamed.new);
    }
    runtime(&config)
        .context("start threads")?
        .block_on(serve(config))
}

/// Prompts are many and cores belong to engines, too: `fastokens` would spread each long prompt over all of them.
fn tokenize_each_prompt_on_one_thread() {
    const THREADS: &str = "FASTOKENS_BPE_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: the process has no other thread yet.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let grace = config.drain_grace;
    let discovery = server::discovery(&config)
        .await
        .context("open the place of discovery")?;
    let processor = Processor::bind(config).await.context("bind")?;
    drain::run(grace, |drain| processor.serve(discovery, drain)).await
}

fn runtime(config: &Config) -> std::io::Result<Runtime> {
    let cores = available_parallelism().map_or(1, NonZero::get);
    let threads = match config.threads {
        0 => cores.div_ceil(CORES_PER_THREAD),
        threads => threads,
    };
    runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(cores.min(LONG_PROMPT_THREADS))
        .thread_keep_alive(KEEP_ALIVE)
        .enable_all()
        .build()
}
