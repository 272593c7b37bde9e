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

/// A node that ran this long had found its first node, or waited for it: what is wrong with its own flags ends it
/// sooner.
const JOINED_AFTER: Duration = Duration::from_secs(60);

/// Shorter lives in a row, from the first one on, after which the node is given up.
const MOST_STARTS: u32 = 5;

/// Keeps the node running until the drain. The engine's first node holds the requests, so there is nothing to
/// finish here.
///
/// # Errors
/// The node cannot be started, or ended soon each of the first times: a wrong flag is not cured by trying again.
/// Later it is started again for ever, as the engine's first node is, with which every end of that one ends it.
pub(crate) async fn run(config: &Config, role: Role, drain: Drain) -> anyhow::Result<()> {
    let spawn = Spawn {
        python: config.python.clone().context("no Python")?,
        model: config.model.clone(),
        args: transfer::node_args(config, role)?,
        env: transfer::node_env(config, role)?,
    };
    let mut lives = Lives::default();
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
        let Some(wait) = lives.ended(since.elapsed()) else {
            bail!("vLLM ended with {status}, as before; its output says why");
        };
        warn!(
            status,
            wait_s = wait.as_secs_f32(),
            "the node ended; starting it again"
        );
        tokio::select! {
            () = time::sleep(wait) => {}
            () = drain.draining() => return Ok(()),
        }
    }
}

/// How a node fared so far.
struct Lives {
    joined: bool,
    starts: u32,
    wait: Duration,
}

impl Default for Lives {
    fn default() -> Self {
        Self {
            joined: false,
            starts: 0,
            wait: BACK_OFF_FIRST,
        }
    }
}

impl Lives {
    /// Notes a life's end; returns the pause until the next, unless there shall be none.
    fn ended(&mut self, after: Duration) -> Option<Duration> {
        self.joined |= after >= JOINED_AFTER;
        self.starts += 1;
        if !self.joined && self.starts >= MOST_STARTS {
            return None;
        }
        if after > WELL_AFTER {
            self.wait = BACK_OFF_FIRST;
        }
        let wait = self.wait;
        self.wait = (wait * 2).min(BACK_OFF_MOST);
        Some(wait)
    }
}

/// How long vLLM gets to end by itself.
const GRACE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_given_up_only_if_it_never_joined_its_first_node() {
        let second = Duration::from_secs(1);
        let mut wrong = Lives::default();
        let pauses: Vec<_> = std::iter::from_fn(|| wrong.ended(second)).collect();
        assert_eq!(pauses, [1, 2, 4, 8].map(Duration::from_secs));

        let mut joined = Lives::default();
        assert!(joined.ended(JOINED_AFTER).is_some());
        for _ in 0..20 {
            assert!(joined.ended(second).is_some());
        }
        assert_eq!(joined.ended(second), Some(BACK_OFF_MOST));
        assert_eq!(joined.ended(WELL_AFTER * 2), Some(BACK_OFF_FIRST));
    }
}
