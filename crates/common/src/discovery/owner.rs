//! Whose a registration is, so that the death of a process on this host shows before its lease ends.

use std::fs;

use serde::{Deserialize, Serialize};

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

/// Returns what makes pids unique: this boot and this pid namespace; empty where the system does not tell.
pub(super) fn host() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => String::new(),
    }
}

/// Returns when a process started, in clock ticks since boot; absent if it does not run (a zombie
/// does not). Field 22 of `/proc/<pid>/stat`, proc(5).
pub(super) fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}
