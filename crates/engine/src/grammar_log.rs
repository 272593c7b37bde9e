//! Whether the engine's log blames a request's constraint.
//!
//! vLLM 0.32 ends a request whose grammar does not compile with an error and no reason; only its log has one
//! (`v1/structured_output/__init__.py`). The line is written before the error is sent, into a file of this machine,
//! so it is there when somebody asks. Other errors without a reason are no fault of the request.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use tracing::debug;

/// How far back is looked. The line stands right in front of its traceback, which takes some kilobytes; the
/// rest is for other requests that fail at the same time.
const LOOK_BACK: u64 = 1 << 20;

/// Says whether the log tells that the grammar of the request with this id did not compile.
pub(crate) fn blames(log: &Path, engine_id: &str) -> bool {
    let tail = tail(log).unwrap_or_else(|error| {
        debug!(%error, "the engine's log cannot be read");
        String::new()
    });
    let line = format!("Failed to compile grammar for request {engine_id}");
    tail.lines().any(|said| said.trim_end().ends_with(&line))
}

fn tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOOK_BACK)))?;
    let mut bytes = Vec::new();
    file.take(LOOK_BACK).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_request_that_the_log_names_is_blamed() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let log = folder.path().join("engine.log");
        assert!(!blames(&log, "cmpl-1-0000002a"));
        let line = "(EngineCore pid=7) ERROR 11-22 02:54:17 [__init__.py:208] Failed to compile grammar for request ";
        let filler = "INFO a line\n".repeat(200_000);
        std::fs::write(
            &log,
            format!("{line}old-0000002b\n{filler}{line}cmpl-1-0000002a\nTraceback\n"),
        )
        .expect("write");
        assert!(blames(&log, "cmpl-1-0000002a"));
        assert!(!blames(&log, "cmpl-1-0000002"));
        assert!(!blames(&log, "old-0000002b"), "too far back to be of now");
    }
}
