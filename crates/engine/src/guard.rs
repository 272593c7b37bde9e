//! Ends an engine whose worker is gone, however the worker went.
//!
//! The parent-death signal of Linux does not do: it fires when the *thread* that spawned dies (a
//! runtime may end its threads at any time), and it reaches vLLM's launcher but not the EngineCore
//! behind it, which would then hold the GPU for ever. So a shell waits on a pipe that only the worker
//! holds open. It reads the engine's process group from it, then waits for its end: a word means that
//! the worker has seen to everything, and an end without a word that the worker died.

use std::{
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, ChildStdin, Command, Stdio},
};

/// Asks the group to end, and kills after ten seconds what has not. A negative number is a group;
/// dash does not take the `--` that would make this plainer.
const SCRIPT: &str = "read group || exit 0
read word && exit 0
kill -TERM -$group 2>/dev/null || exit 0
for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -0 -$group 2>/dev/null || exit 0; done
kill -KILL -$group 2>/dev/null";

/// The waiting shell. Dropping it without [`Guard::dismiss`] ends the engine.
pub(crate) struct Guard {
    shell: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the shell, in a group of its own so that a Ctrl-C at the worker's terminal spares it.
    pub(crate) fn spawn() -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "stator-engine-guard"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = shell.stdin.take();
        Ok(Self { shell, pipe })
    }

    /// Guards the group of an engine that runs already.
    pub(crate) fn over(pgid: i32) -> io::Result<Self> {
        let mut guard = Self::spawn()?;
        let pipe = guard.pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        writeln!(pipe, "{pgid}")?;
        Ok(guard)
    }

    /// Makes a command that is about to be spawned lead a session of its own and name its group to the
    /// guard by itself, before it runs anything: there is no moment at which it runs unguarded.
    pub(crate) fn enlist(&self, command: &mut tokio::process::Command) -> io::Result<()> {
        let pipe: OwnedFd = match &self.pipe {
            Some(pipe) => std::os::fd::AsFd::as_fd(pipe).try_clone_to_owned()?,
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        // SAFETY: between fork and exec only calls that POSIX lists as async-signal-safe are made
        // (setsid, getpid, write), on memory of this closure.
        unsafe {
            command.pre_exec(move || {
                lead_session()?;
                write_pid(pipe.as_raw_fd())
            });
        }
        Ok(())
    }

    /// Sends the shell home: the engine has ended, or is meant to stay.
    pub(crate) fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"done\n");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe.take();
        // Reaped by a thread, since it may yet wait for the engine; a zombie would do no harm either.
        if matches!(self.shell.try_wait(), Ok(None)) {
            let pid = nix::unistd::Pid::from_raw(self.shell.id().cast_signed());
            let _ = std::thread::Builder::new()
                .name("engine-guard".into())
                .spawn(move || nix::sys::wait::waitpid(pid, None));
        }
    }
}

/// Leaves the worker's session and process group. Async-signal-safe.
fn lead_session() -> io::Result<()> {
    nix::unistd::setsid().map(drop).map_err(io::Error::from)
}

/// Writes this process's pid in decimal, and a line end. Async-signal-safe.
fn write_pid(fd: RawFd) -> io::Result<()> {
    let mut digits = [b'\n'; 12];
    let mut at = digits.len() - 1;
    let mut rest = std::process::id();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let line = &digits[at..];
    // SAFETY: the descriptor is open (the closure owns it), and the buffer is valid for its length.
    let written = unsafe { libc::write(fd, line.as_ptr().cast(), line.len()) };
    if written == line.len().cast_signed() {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, ProcessId};

    /// A command like an engine: a leader with a child of its own, both deaf to being asked nicely.
    fn engine() -> tokio::process::Command {
        let mut command = tokio::process::Command::new("/bin/sh");
        command.args(["-c", "sleep 1000 & wait"]);
        command
    }

    fn spawned(guard: &Guard) -> Process {
        let mut command = engine();
        guard.enlist(&mut command).expect("enlist");
        let child = command.spawn().expect("spawn");
        let pid = child.id().expect("it runs").cast_signed();
        Process::open(ProcessId::of(pid).expect("it runs")).expect("open")
    }

    #[tokio::test]
    async fn an_engine_ends_when_its_guard_is_dropped() {
        let guard = Guard::spawn().expect("guard");
        let engine = spawned(&guard);
        drop(guard);
        engine.ended().await;
    }

    #[tokio::test]
    async fn an_engine_outlives_a_dismissed_guard() {
        let guard = Guard::spawn().expect("guard");
        let engine = spawned(&guard);
        let shell = ProcessId::of(guard.shell.id().cast_signed()).expect("it runs");
        let shell = Process::open(shell).expect("open");
        guard.dismiss();
        shell.ended().await;
        assert!(engine.id().is_alive());
        engine.end_group(std::time::Duration::from_secs(5)).await;
        engine.ended().await;
    }
}
