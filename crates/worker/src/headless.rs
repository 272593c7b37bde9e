//! A further node of an engine that spans several machines: no plane, no discovery, only vLLM under supervision.

use std::time::Duration;

use anyhow::{Context, bail};
use stator_common::{card::Role, drain::Drain};
use stator_engine::{Node, Spawn};
use tokio::time::{self, Instant};
use tracing::{info, warn};

use crate::{
    config::Config,
    rank::{BACK_OFF_FIRST, BACK_OFF_MOST, WELL_AFTER},
    transfer,
};

/// Keeps the node running until the drain. The engine's first node holds the requests, so there is nothing to
/// finish here.
///
/// # Errors
/// The node cannot be started, or ends before it was well for the first time: a wrong flag is not cured by
/// trying again. Later it is started again for ever, as the engine's first node is.
pub(crate) async fn run(config: &Config, role: Role, drain: Drain) -> anyhow::Result<()> {
    let spawn = Spawn {
        python: config.python.clone().context("no Python")?,
        model: config.model.clone(),
        args: transfer::node_args(config, role)?,
        env: transfer::node_env(config, role)?,
    };
    let mut wait = BACK_OFF_FIRST;
    let mut was_well = false;
    loop {
        let since = Instant::now();
        info!(model = config.model, "starting a further node of an engine");
        let mut node = Node::spawn(&spawn).context("start vLLM")?;
        let status = tokio::select! {
            status = node.ended() => status,
            () = drain.draining() => {
                node.end(GRACE).await;
                return Ok(());
            }
        };
        if since.elapsed() > WELL_AFTER {
            was_well = true;
            wait = BACK_OFF_FIRST;
        }
        if !was_well {
            bail!("vLLM ended with {status}; its output says why");
        }
        warn!(
            status,
            wait_s = wait.as_secs_f32(),
            "the node ended; starting it again"
        );
        tokio::select! {
            () = time::sleep(wait) => {}
            () = drain.draining() => return Ok(()),
        }
        wait = (wait * 2).min(BACK_OFF_MOST);
    }
}

/// How long vLLM gets to end by itself.
const GRACE: Duration = Duration::from_secs(10);
