//! Whose a registration is, so that the death of a process on this host shows before its lease ends.

use serde::{Deserialize, Serialize};

use crate::process::{host, start_of};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    /// Boot and pid namespace: pids mean something only within both. Empty: unknown.
    pub(super) host: String,
    pub(super) pid: u32,
    /// When the process started, in the kernel's clock ticks: pids are reused.
    pub(super) start: u64,
}

impl Owner {
    /// Returns this process.
    pub(super) fn this_process() -> Self {
        let pid = std::process::id();
        Self {
            host: host(),
            pid,
            start: start_of(pid).unwrap_or_default(),
        }
    }

    /// Says whether the process certainly does not run any more.
    pub(super) fn is_dead(&self) -> bool {
        !self.host.is_empty() && self.host == host() && start_of(self.pid) != Some(self.start)
    }
}
