//! Follows the engine's log file: every line goes to `tracing`, progress to the state.
//!
//! The engine writes to a file and not into a pipe, because a kept engine must outlive its worker: a
//! broken pipe would end it at its next line. The file is read by polling; a line that shows up a
//! quarter of a second late costs nobody anything.

use std::{
    convert::Infallible,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    path::Path,
    time::Duration,
};

use tracing::{debug, info};

use crate::{progress, state::Phase};

/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(250);
/// Size at which a log that has been read is emptied. The engine appends, so it goes on at the start.
const MAX_BYTES: u64 = 64 << 20;
/// A line longer than this is cut (vLLM prints its whole configuration as one line of about 5 kB).
const MAX_LINE: usize = 16 << 10;

/// Opens a log for an engine to append to; `stdout` and `stderr` of one process share it. The log of
/// the engine before, which may say why that one ended, is kept beside it.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    match fs::rename(path, path.with_extension("log.1")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::create(path)?;
    OpenOptions::new().append(true).open(path)
}

/// Reads a log as it grows.
pub(crate) struct Tail {
    file: File,
    rank: u32,
    cause: Option<String>,
    partial: Vec<u8>,
}

impl Tail {
    /// Opens the log of data-parallel rank `rank`, at its start or (for an adopted engine) at its end.
    pub(crate) fn open(path: &Path, rank: u32, at_end: bool) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        if at_end {
            file.seek(SeekFrom::End(0))?;
        }
        Ok(Self {
            file,
            rank,
            cause: None,
            partial: Vec::new(),
        })
    }

    /// Follows the log until the future is dropped. `phase` hears of progress.
    pub(crate) async fn follow(&mut self, mut phase: impl FnMut(Phase)) -> Infallible {
        loop {
            self.read_now(&mut phase);
            tokio::time::sleep(POLL).await;
        }
    }

    /// Reads what is there, and returns the last line so far that looked like the cause of a failure.
    pub(crate) fn last_words(&mut self) -> Option<String> {
        self.read_now(&mut |_| {});
        self.cause.clone()
    }

    /// Local file reads of a few kilobytes; not worth another thread.
    fn read_now(&mut self, phase: &mut impl FnMut(Phase)) {
        if let Err(error) = self.read_new(phase) {
            debug!(rank = self.rank, %error, "the engine's log cannot be read");
        }
    }

    fn read_new(&mut self, phase: &mut impl FnMut(Phase)) -> io::Result<()> {
        let mut chunk = [0u8; 8192];
        loop {
            let n = self.file.read(&mut chunk)?;
            if n == 0 {
                break;
            }
            for byte in &chunk[..n] {
                // tqdm redraws its bar with carriage returns.
                if matches!(byte, b'\n' | b'\r') {
                    self.line(phase);
                } else if self.partial.len() < MAX_LINE {
                    self.partial.push(*byte);
                }
            }
        }
        if self.file.stream_position()? > MAX_BYTES {
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
        }
        Ok(())
    }

    fn line(&mut self, phase: &mut impl FnMut(Phase)) {
        let line = String::from_utf8_lossy(&self.partial);
        if !line.trim().is_empty() {
            info!(target: "engine", rank = self.rank, "{line}");
            if let Some(next) = progress::phase(&line) {
                phase(next);
            }
            if progress::is_cause(&line) {
                self.cause = Some(line.trim().to_owned());
            }
        }
        self.partial.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_tail_reads_lines_redrawn_bars_and_causes() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("engine.log");
        let mut log = create(&path).expect("create");
        let mut tail = Tail::open(&path, 0, false).expect("open");
        let mut phases = Vec::new();
        let bar =
            "checkpoint shards:   0% C\rcheckpoint shards: 100% C\nValueError: bad\nhalf a li";
        log.write_all(bar.as_bytes()).expect("write");
        tail.read_new(&mut |phase| phases.push(phase))
            .expect("read");
        assert_eq!(
            phases,
            [
                Phase::LoadingWeights { percent: 0 },
                Phase::LoadingWeights { percent: 100 }
            ]
        );
        assert_eq!(tail.last_words().as_deref(), Some("ValueError: bad"));
        assert_eq!(tail.partial, b"half a li");
    }
}
