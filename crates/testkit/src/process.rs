//! What runs on this machine, and how a test ends what it started.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

pub use nix::sys::signal::Signal;
use nix::sys::signal::{kill, killpg};
use nix::unistd::Pid;

/// A process in a group of its own. Dropping it kills the whole group.
pub struct Group(Child);

impl Group {
    /// Starts the process.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.process_group(0).spawn();
        Self(child.unwrap_or_else(|error| panic!("start {command:?}: {error}")))
    }

    /// Sends a signal to every process of the group.
    pub fn signal(&self, signal: Signal) {
        killpg(pid(self.0.id()), signal).expect("the group can be signalled");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Fails only where nothing of it is left.
        let _ = killpg(pid(self.0.id()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Sends a signal to a process that must be there.
pub fn signal(to: u32, signal: Signal) {
    kill(pid(to), signal).unwrap_or_else(|error| panic!("{signal} to {to}: {error}"));
}

/// Returns the live processes of a group.
pub fn group_members(group: u32) -> Vec<u32> {
    live(|process| process.group == group)
}

/// Returns the live children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    live(|process| process.parent == parent)
}

/// Says whether a process is there and not merely waiting for its parent to notice its end.
pub fn is_alive(pid: u32) -> bool {
    Stat::read(pid).is_some_and(|process| process.lives)
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed())
}

fn live(wanted: impl Fn(&Stat) -> bool) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| Stat::read(*pid).is_some_and(|process| process.lives && wanted(&process)))
        .collect()
}

/// What `/proc/PID/stat` says of a process.
struct Stat {
    lives: bool,
    parent: u32,
    group: u32,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before it may hold anything, parentheses too.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        Some(Self {
            lives: fields.next()? != "Z",
            parent: fields.next()?.parse().ok()?,
            group: fields.next()?.parse().ok()?,
        })
    }
}
