//! The processes that are measured: simulated engines, workers, a processor. They end with this one.

use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::client::{Ask, Connection};

/// How long a topology may take to answer; it takes a second.
const START: Duration = Duration::from_secs(30);

/// A child that ends with its handle.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts a program with its output in `logs/name`.
    pub(crate) fn start(
        program: &Path,
        name: &str,
        args: &[String],
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let log = std::fs::File::create(logs.join(name)).context("create a log")?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share a log")?)
            .stderr(log);
        // SAFETY: prctl with these arguments is safe to call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // However this process ends, the child ends too.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn();
        let child = child.with_context(|| format!("start {}", program.display()))?;
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error if it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().context("look after a child")? {
            Some(status) => bail!("{} ended: {status}", self.name),
            None => Ok(()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is to be started.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) bin: &'a Path,
    pub(crate) model: &'a Path,
    pub(crate) workers: u16,
    pub(crate) router: &'a str,
    /// How requests come to workers.
    pub(crate) request_plane: &'a str,
    /// Flags of the simulated engine: its pace.
    pub(crate) engine: &'a [&'a str],
    /// An empty folder for discovery, run directories and logs.
    pub(crate) folder: PathBuf,
}

/// A processor with its workers and their engines, answering.
#[derive(Debug)]
pub(crate) struct Topology {
    engines: Vec<Process>,
    workers: Vec<Process>,
    processor: Process,
    pub(crate) address: String,
}

impl Topology {
    /// Starts everything and waits until the model answers.
    pub(crate) async fn start(plan: &Plan<'_>) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&plan.folder).context("make a folder")?;
        let discovery = plan.folder.join("discovery").display().to_string();
        let model = plan.model.display().to_string();
        let (mut engines, mut workers) = (Vec::new(), Vec::new());
        for index in 0..plan.workers {
            let port = free_port()?;
            // The engine belongs to the bench and not to the worker, so that it does not count.
            let mut args = words(&[
                "serve",
                &model,
                "--headless",
                "--data-parallel-address",
                "127.0.0.1",
                "--data-parallel-rpc-port",
                &port.to_string(),
                "--max-num-seqs",
                "1024",
            ]);
            args.extend(words(plan.engine));
            let start = |program: &str, name: String, args: &[String]| {
                Process::start(&plan.bin.join(program), &name, args, &plan.folder)
            };
            let run = plan
                .folder
                .join(format!("run-{index}"))
                .display()
                .to_string();
            let attach = format!("tcp://127.0.0.1:{port}");
            let worker = words(&[
                "--model",
                &model,
                "--served-model-name",
                "bench",
                "--engine-attach",
                &attach,
                "--request-plane",
                plan.request_plane,
                "--discovery-path",
                &discovery,
                "--run-dir",
                &run,
            ]);
            workers.push(start("stator-agg", format!("agg-{index}"), &worker)?);
            engines.push(start("stator-sim", format!("sim-{index}"), &args)?);
        }
        let port = free_port()?.to_string();
        let args = words(&[
            "--http-port",
            &port,
            "--discovery-path",
            &discovery,
            "--router-mode",
            plan.router,
        ]);
        let program = plan.bin.join("stator-processor");
        let processor = Process::start(&program, "processor", &args, &plan.folder)?;
        let mut topology = Self {
            engines,
            workers,
            processor,
            address: format!("127.0.0.1:{port}"),
        };
        topology.wait(plan).await?;
        Ok(topology)
    }

    /// Waits until every worker has answered.
    async fn wait(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let deadline = Instant::now() + START;
        let mut answers = 0;
        // Workers take turns, so twice as many answers reach each of them.
        while answers < 2 * plan.workers {
            let all = [&mut self.processor]
                .into_iter()
                .chain(&mut self.engines)
                .chain(&mut self.workers);
            for process in all {
                let logs = plan.folder.display();
                process
                    .check()
                    .with_context(|| format!("see the logs in {logs}, or use --logs"))?;
            }
            if Instant::now() > deadline {
                bail!(
                    "no answer in {START:?}; logs in {}, or use --logs",
                    plan.folder.display()
                );
            }
            let asked = async {
                let mut connection = Connection::open(&self.address).await?;
                connection.ask(&Ask::completion("hello", 1)).await
            };
            match asked.await {
                Ok(_) => answers += 1,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        Ok(())
    }

    pub(crate) fn processor(&self) -> Vec<u32> {
        vec![self.processor.pid()]
    }

    pub(crate) fn workers(&self) -> Vec<u32> {
        self.workers.iter().map(Process::pid).collect()
    }
}

/// A port that nobody listens on; somebody may take it before it is used, which shows at once.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.port())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
