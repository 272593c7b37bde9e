//! The engine's process on this machine: waited for, read, ended.

use std::time::Duration;

use tokio::process::Child;

use crate::{
    guard::Guard,
    logtail::Tail,
    process::{Process, ProcessId, kill_group},
    spawn::Spawned,
    state::Phase,
};

/// The engine's process, as far as there is one on this machine.
pub(crate) struct Local {
    /// Absent for an adopted engine.
    child: Option<Child>,
    process: Process,
    /// Absent if the engine is kept.
    guard: Option<Guard>,
    tail: Tail,
    /// Whether a drop ends it: before anybody has it, nobody else would.
    starting: bool,
}

impl Local {
    pub(crate) fn spawned(spawned: Spawned, tail: Tail) -> Self {
        let Spawned {
            child,
            process,
            guard,
        } = spawned;
        Self {
            child: Some(child),
            process,
            guard: Some(guard),
            tail,
            starting: true,
        }
    }

    /// Takes a running process.
    ///
    /// - `guard`: what watches it from now on; absent if it is kept.
    pub(crate) fn adopted(process: Process, tail: Tail, guard: Option<Guard>) -> Self {
        Self {
            child: None,
            process,
            guard,
            tail,
            starting: false,
        }
    }

    /// Notes that there is a record of the engine now, and whether it may outlive us by that.
    pub(crate) fn is_recorded(&mut self, keep: bool) {
        self.starting = false;
        if keep && let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.process.id()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id().pid
    }

    /// Returns the last line of the log that looks like the cause of a failure.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        self.tail.last_words()
    }

    /// Waits for the end of the process, following its log until then; returns its status in words.
    /// Cancel safe.
    pub(crate) async fn ended(&mut self, phase: impl FnMut(Phase)) -> String {
        let Local {
            child,
            process,
            tail,
            ..
        } = self;
        let ended = async {
            if let Some(child) = child
                && let Ok(status) = child.wait().await
            {
                return status.to_string();
            }
            process.ended().await;
            "status unknown, it was not our child".to_owned()
        };
        tokio::select! {
            status = ended => status,
            never = tail.follow(phase) => match never {},
        }
    }

    /// Lets the process run on without us.
    pub(crate) fn leave(mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// Ends what is left of the process and its group, and what waits for it.
    pub(crate) async fn clear_away(mut self, grace: Duration) {
        self.starting = false;
        self.process.end_group(grace).await;
        if let Some(mut child) = self.child.take() {
            let _ = child.wait().await;
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if self.starting {
            kill_group(self.process.id().pid);
        }
    }
}
