//! Ending an engine that its worker left running, where no other worker will come for it.

use std::path::Path;

use tracing::info;

use crate::{
    config::Waits,
    error::StartError,
    process,
    rundir::{Left, RunDir},
};

/// Ends the engine that a worker left running in this directory, if there is one.
///
/// # Errors
/// A worker has the directory, its record does not say which process it is about, or that process runs and cannot
/// be taken hold of.
pub async fn end_left(run_dir: &Path) -> Result<(), StartError> {
    if !run_dir.is_dir() {
        return Ok(());
    }
    let opened = RunDir::open(run_dir).map_err(|source| StartError::RunDir {
        path: run_dir.to_owned(),
        source,
    })?;
    let (process, host) = match opened.load()? {
        Left::Nothing => return Ok(()),
        Left::Record(record) => (record.process, record.host),
        Left::Trace(trace) => (trace.process, trace.host),
    };
    if let Some(id) = process {
        info!(pid = id.pid, "ending an engine that nobody will adopt");
        let ended = process::end_recorded(id, &host, Waits::default().shutdown).await;
        ended.map_err(|source| StartError::Kept {
            pid: id.pid,
            source,
        })?;
    }
    opened.forget();
    Ok(())
}
