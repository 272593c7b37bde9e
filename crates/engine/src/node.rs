//! A further node of an engine that spans several machines: vLLM itself, which the engine's first node finds by
//! vLLM's own flags. It takes no requests and says nothing to us; it is started, waited for and ended.

use std::{io, process::Stdio, time::Duration};

use tokio::process::{Child, Command};

use crate::{config::Spawn, guard::Guard, process::Process, spawn};

/// A running node. Dropping it ends it, in the background.
pub struct Node {
    child: Child,
    process: Process,
    guard: Guard,
}

impl Node {
    /// Starts `vllm serve MODEL <args> --headless`, whose output is this process's.
    ///
    /// It ends with this process, however that ends.
    ///
    /// # Errors
    /// The Python cannot be run.
    pub fn spawn(config: &Spawn) -> io::Result<Self> {
        let mut command = Command::new(&config.python);
        command
            .args(spawn::VLLM)
            .args(["serve", &config.model])
            .args(&config.args)
            .arg("--headless")
            .env_remove("PYTHONDONTWRITEBYTECODE")
            .envs(config.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null());
        let guard = Guard::spawn()?;
        guard.enlist(&mut command)?;
        let child = command.spawn()?;
        let pid = child.id().expect("nobody has waited for it");
        Ok(Self {
            process: Process::of_child(pid.cast_signed())?,
            child,
            guard,
        })
    }

    /// Waits until it ends by itself; returns its status in words. Cancel safe.
    pub async fn ended(&mut self) -> String {
        match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Ends it and everything it started: asks, waits up to `grace`, then kills what is left.
    pub async fn end(mut self, grace: Duration) {
        self.process.end_group(grace).await;
        let _ = self.child.wait().await;
        self.guard.dismiss();
    }
}
