//! The end of a topology: who is told to end, in which order.
//!
//! The processor first: it takes no more requests and finishes those that run, for which it needs every worker. When it
//! has ended, no request is left. Then decode and aggregated workers, and last prefill workers: an engine that is still
//! fetching KV, for a request that was cut off, finds it where it was.

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use stator_common::card::Role;
use tokio::time::{Instant, sleep_until};

use super::{Fleet, GOODBYE, Member, State, has_role};
use crate::child;
use crate::plan::Part;

impl Fleet {
    /// Ends everything, stage by stage.
    ///
    /// Each stage has the drain's grace and a little more. When that is over, or `now` says so, whatever is left is
    /// killed.
    ///
    /// # Errors
    /// When something was killed, or did not end well.
    pub(crate) async fn drain(mut self, at_once: impl Future<Output = ()>) -> Result<()> {
        tokio::pin!(at_once);
        let mut failed = Vec::new();
        let mut members = std::mem::take(&mut self.members);
        for stage in 0..3 {
            let deadline = Instant::now() + self.plan.up.drain_grace + GOODBYE;
            let (leaving, staying) = members.into_iter().partition(|m| order(m) == stage);
            members = staying;
            let ended = end(leaving, &mut failed);
            tokio::select! {
                () = ended => {}
                () = &mut at_once => bail!("killed what had not ended"),
                () = sleep_until(deadline) => bail!("killed what had not ended in time"),
            }
        }
        if !failed.is_empty() {
            bail!("not a clean end: {}", failed.join("; "));
        }
        Ok(())
    }
}

/// Returns the stage in which a member ends.
fn order(member: &Member) -> usize {
    match member.part {
        Part::Processor => 0,
        part if has_role(part, Role::Prefill) => 2,
        Part::Worker { .. } | Part::Headless(_) => 1,
    }
}

/// Tells members to end and waits until they have. Dropping it kills them.
async fn end(members: Vec<Member>, failed: &mut Vec<String>) {
    let mut children = Vec::new();
    let mut clearing = Vec::new();
    for member in members {
        match member.state {
            State::Running(child) => {
                child.signal(Signal::SIGTERM);
                children.push(child);
            }
            // A second signal would end it at once.
            State::Leaving { child, .. } => children.push(child),
            State::Clearing(task) => clearing.push(task),
            State::Waiting { .. } | State::Failed => {}
        }
    }
    for mut child in children {
        match child.wait().await {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("{} {}", child.spec.name, child::describe(status))),
            Err(error) => failed.push(format!("{}: {error}", child.spec.name)),
        }
    }
    for task in clearing {
        // What went wrong stands in the worker's log.
        let _ = task.await;
    }
}
