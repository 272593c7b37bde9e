//! Processes that may not be our children: named so that a recycled pid is noticed, waited for, ended.

use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// A process for good: its pid, and the time it started at, so that another process that got the
/// same pid later is not taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// Clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub(crate) started: u64,
}

impl ProcessId {
    /// Returns the identity of the process that has `pid` now; `None` if there is none (or only a
    /// zombie is left).
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (started, alive) = start_time(&stat)?;
        alive.then_some(Self { pid, started })
    }

    /// Says whether this very process still runs.
    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Reads the start time out of a `stat` line, and whether it is more than a zombie's. The second field
/// is the command in parentheses and may itself contain anything.
fn start_time(stat: &str) -> Option<(u64, bool)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    // The state is field 3, the start time field 22.
    let started = fields.nth(18)?.parse().ok()?;
    Some((started, !matches!(state, "Z" | "X")))
}

/// A live process that can be waited for, child or not.
pub(crate) struct Process {
    id: ProcessId,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of the process that `id` names.
    ///
    /// # Errors
    /// `NotFound` if it does not run any more, even if another process has its pid now.
    pub(crate) fn open(id: ProcessId) -> io::Result<Self> {
        let fd = pidfd(id.pid)?;
        // Only now: the descriptor pins the process, so what is alive here is what it names.
        if !id.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Self::new(id, fd)
    }

    /// Takes hold of a child that has not been waited for, even if it has ended by now.
    pub(crate) fn of_child(pid: i32) -> io::Result<Self> {
        let fd = pidfd(pid)?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (started, _) = start_time(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Self::new(ProcessId { pid, started }, fd)
    }

    fn new(id: ProcessId, fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned by the AsyncFd, so it stays open and the same.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? };
        Ok(Self { id, fd })
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until the process has ended. Cancel safe.
    pub(crate) async fn ended(&self) {
        // A pidfd becomes readable once, when its process ends, and stays so.
        if self.fd.readable().await.is_err() {
            while self.id.is_alive() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Ends the process and its group: asks, waits up to `grace`, then kills what is left.
    ///
    /// Our engines lead a group of their own, so this reaches the EngineCore behind vLLM's launcher,
    /// which nothing else would end if the launcher is gone. The group goes by the leader's pid until its
    /// last process ends; only then could another have it.
    pub(crate) async fn end_group(&self, grace: Duration) {
        let _ = killpg(Pid::from_raw(self.id.pid), Signal::SIGTERM);
        let _ = tokio::time::timeout(grace, group_ended(self.id.pid)).await;
        kill_group(self.id.pid);
        let _ = tokio::time::timeout(grace, group_ended(self.id.pid)).await;
    }
}

/// Opens a descriptor of a process.
fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: the descriptor was just made for us, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
            error => error,
        }),
    }
}

/// Waits until no process is left in the group. Zombies that nobody reaps do not count.
async fn group_ended(pgid: i32) {
    while group_is_alive(pgid) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn group_is_alive(pgid: i32) -> bool {
    // Signal 0 says whether the group has any member, zombies included; only then look closer.
    if killpg(Pid::from_raw(pgid), None).is_err() {
        return false;
    }
    let Ok(entries) = fs::read_dir("/proc") else {
        return true;
    };
    entries.flatten().any(|entry| {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            return false;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            return false;
        };
        let group = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(2));
        group == Some(&pgid.to_string()) && start_time(&stat).is_some_and(|(_, alive)| alive)
    })
}

/// Ends the group of a process that was written down, perhaps long ago.
///
/// - `host`: what [`host`](stator_common::process::host) said when it was; empty: unknown.
///
/// # Errors
/// The process runs, but cannot be taken hold of.
pub(crate) async fn end_recorded(id: ProcessId, host: &str, grace: Duration) -> io::Result<()> {
    let here = stator_common::process::host();
    if !host.is_empty() && host != here {
        // Of another boot or pid namespace: its pid says nothing here.
        return Ok(());
    }
    match Process::open(id) {
        Ok(process) => process.end_group(grace).await,
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // Without a leader nothing but the number names the group, which must then be of here for certain.
        Err(_) if host == here && !here.is_empty() => kill_leaderless(id.pid),
        Err(_) => {}
    }
    Ok(())
}

/// Kills what is left of a group whose leader is gone: an EngineCore whose launcher was killed.
///
/// Does nothing if a process has the pid: that is another one then, since a pid is not given out again
/// while a group still goes by it.
fn kill_leaderless(pgid: i32) {
    if ProcessId::of(pgid).is_none() && group_is_alive(pgid) {
        kill_group(pgid);
    }
}

/// Kills whatever is left of the group that the process `pgid` led.
pub(crate) fn kill_group(pgid: i32) {
    let _ = killpg(Pid::from_raw(pgid), Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::process::CommandExt,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_command_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(start_time(stat), Some((4242, true)));
        assert_eq!(
            start_time(&stat.replace(") S ", ") Z ")),
            Some((4242, false))
        );
        assert_eq!(start_time("nonsense"), None);
    }

    #[test]
    fn a_recycled_pid_is_not_the_same_process() {
        let me = ProcessId::of(std::process::id() as i32).expect("this process runs");
        assert!(me.is_alive());
        assert!(
            !ProcessId {
                started: me.started + 1,
                ..me
            }
            .is_alive()
        );
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = Command::new("sleep").arg("100").spawn().expect("spawn");
        let id = ProcessId::of(child.id() as i32).expect("it runs");
        let process = Process::open(id).expect("open");
        child.kill().expect("kill");
        process.ended().await;
        child.wait().expect("reap");
        assert!(Process::open(id).is_err());
    }

    #[tokio::test]
    async fn what_is_left_of_a_group_without_its_leader_is_killed() {
        let mut leader = Command::new("/bin/sh")
            .args(["-c", "sleep 1000 & echo $!"])
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawn");
        let pgid = leader.id().cast_signed();
        let mut line = String::new();
        let stdout = leader.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("read");
        leader.wait().expect("reap");
        let rest = ProcessId::of(line.trim().parse().expect("a pid")).expect("it runs");
        let rest = Process::open(rest).expect("open");
        let leader = ProcessId {
            pid: pgid,
            started: 0,
        };
        for host in ["another boot", ""] {
            end_recorded(leader, host, Duration::ZERO)
                .await
                .expect("nothing to do");
            assert!(rest.id().is_alive(), "{host}");
        }
        end_recorded(leader, &stator_common::process::host(), Duration::ZERO)
            .await
            .expect("end");
        rest.ended().await;
    }
}
