//! One child process: started in its own process group, its output filed and shown, ended for good.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stator_common::settings::of_the_role;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child as TokioChild, Command};
use tokio::sync::mpsc;

use crate::plan::Spec;

/// Lines of a dead child that the error repeats.
const LAST_WORDS: usize = 15;

/// A line that a child printed.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) child: String,
    pub(crate) text: String,
}

/// A running child. Dropping it kills its process; [`Child::signal`] asks it to end.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) spec: Spec,
    pub(crate) log: PathBuf,
    /// Where in the log this life of the process begins.
    begins: u64,
    pid: Pid,
    process: TokioChild,
}

impl Child {
    /// Starts `spec`, with its output going to `<dir>/<name>.log` and, line by line, to `lines`.
    ///
    /// The child gets its own process group, so that Ctrl-C on the terminal reaches the launcher
    /// alone, and SIGTERM if the launcher dies without having ended it.
    pub(crate) fn start(spec: Spec, dir: &Path, lines: mpsc::Sender<Line>) -> io::Result<Child> {
        let log = dir.join(format!("{}.log", spec.name));
        let file = File::options().create(true).append(true).open(&log)?;
        let begins = file.metadata()?.len();
        let launcher = nix::unistd::getpid();
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.args)
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        // What a child cannot do is told in words: the stack says nothing more, unless somebody asks for it.
        if std::env::var_os("RUST_LIB_BACKTRACE").is_none() {
            command.env("RUST_LIB_BACKTRACE", "0");
        }
        // A topology says itself what each of its workers is.
        for name in of_the_role() {
            command.env_remove(name);
        }
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory of the parent.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
                if nix::unistd::getppid() != launcher {
                    return Err(io::Error::other("the launcher is gone"));
                }
                Ok(())
            });
        }
        let mut process = command.spawn().map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("start {}: {error}", spec.program.display()),
            )
        })?;
        let pid = process
            .id()
            .expect("a child that was just started has a pid");
        if let Some(out) = process.stdout.take() {
            tokio::spawn(forward(
                spec.name.clone(),
                out,
                file.try_clone()?,
                lines.clone(),
            ));
        }
        if let Some(err) = process.stderr.take() {
            tokio::spawn(forward(spec.name.clone(), err, file, lines));
        }
        Ok(Child {
            spec,
            log,
            begins,
            pid: Pid::from_raw(pid as i32),
            process,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw() as u32
    }

    /// Sends `signal` to the process. A process that is gone already is no error.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill(self.pid, signal);
    }

    /// Waits for the end of the process. Cancel safe.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait().await
    }

    /// Returns the end of what it has printed.
    pub(crate) fn last_lines(&self) -> String {
        last_lines(&self.log, self.begins)
    }

    /// Returns the exit status if the process has ended.
    pub(crate) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.process.try_wait()
    }
}

/// Says in words how a process ended.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("was ended by {name}"),
            Err(_) => format!("was ended by signal {signal}"),
        },
        (None, None) => "ended".into(),
    }
}

/// Adds a line to a log.
pub(crate) fn note(log: &Path, line: &str) {
    // A full disk must not stop anything.
    if let Ok(mut file) = File::options().append(true).open(log) {
        let _ = writeln!(file, "{line}");
    }
}

/// Returns the end of a log, without the stack that `RUST_LIB_BACKTRACE` adds to an error.
///
/// - `begins`: bytes of it that are older.
fn last_lines(log: &Path, begins: u64) -> String {
    let read = || {
        let mut file = File::open(log)?;
        file.seek(io::SeekFrom::Start(begins))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let mut lines: Vec<&str> = text.trim_end().lines().collect();
    if let Some(stack) = lines.iter().rposition(|line| *line == "Stack backtrace:")
        && lines[stack + 1..].iter().all(|line| line.starts_with(' '))
    {
        lines.truncate(stack);
    }
    lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n")
}

async fn forward(
    child: String,
    out: impl AsyncRead + Unpin,
    mut file: File,
    to: mpsc::Sender<Line>,
) {
    let mut reader = BufReader::new(out);
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        match reader.read_until(b'\n', &mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // A full disk must not stop the child.
        let _ = file.write_all(&buffer);
        let text = String::from_utf8_lossy(&buffer).trim_end().to_owned();
        let line = Line {
            child: child.clone(),
            text,
        };
        if to.send(line).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_last_words_of_a_child_are_not_its_stack() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let stack = format!("\nStack backtrace:\n{}", "   0: f\n".repeat(40));
        let error = "Error: bind\n\nCaused by:\n    taken\n";
        fs::write(log.path(), format!("{error}{stack}")).unwrap();
        assert_eq!(last_lines(log.path(), 0), error);
        // That of an earlier run hides nothing.
        fs::write(log.path(), format!("{error}{stack}started\n")).unwrap();
        assert!(last_lines(log.path(), 0).ends_with("f\nstarted"));
    }
}
