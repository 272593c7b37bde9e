//! How a worker stays in the folder: its file, renewed until it leaves.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Owned, TTL, create_unshared, list, read};

/// A file this old has no owner any more and is removed by whoever registers next.
const FORGET: Duration = Duration::from_secs(600);

/// Writes a worker's file, and keeps it there until what is returned is dropped.
pub(super) fn hold(path: PathBuf, json: Vec<u8>) -> io::Result<Leave> {
    let lease = Arc::new(Lease {
        path,
        json,
        writing: Mutex::default(),
    });
    lease.write()?;
    let stop = CancellationToken::new();
    tokio::spawn(renew(lease.clone(), stop.clone()));
    Ok(Leave { stop, lease })
}

/// A worker's file.
struct Lease {
    path: PathBuf,
    json: Vec<u8>,
    /// Held by whoever writes or removes the file.
    writing: Mutex<()>,
}

pub(super) struct Leave {
    stop: CancellationToken,
    lease: Arc<Lease>,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.stop.cancel();
        // A renewal that runs now ends before the file is removed, and none comes after it.
        let _writing = self.lease.writing.lock();
        if let Err(error) = fs::remove_file(&self.lease.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %self.lease.path.display(), %error, "leave discovery; the lease will end by itself");
        }
    }
}

impl Lease {
    fn write(&self) -> io::Result<()> {
        let temporary = self
            .path
            .with_extension(format!("tmp-{}", std::process::id()));
        fs::write(&temporary, &self.json)?;
        fs::rename(&temporary, &self.path)
    }

    /// Renews the file, unless its worker has left.
    fn renew(&self, stop: &CancellationToken) -> io::Result<()> {
        let _writing = self.writing.lock();
        if stop.is_cancelled() {
            return Ok(());
        }
        match fs::File::open(&self.path).and_then(|file| file.set_modified(SystemTime::now())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                warn!(path = %self.path.display(), "registration vanished: writing it again");
                if let Some(folder) = self.path.parent() {
                    create_unshared(folder)?;
                }
                self.write()
            }
            other => other,
        }
    }
}

async fn renew(lease: Arc<Lease>, stop: CancellationToken) {
    let mut every = time::interval(TTL / 3);
    every.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    every.tick().await;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        if let Err(error) = lease.renew(&stop) {
            warn!(path = %lease.path.display(), %error, "renew the registration");
        }
    }
}

/// Removes files that nobody owns any more.
pub(super) fn sweep(folder: &Path) {
    for (path, modified) in list(folder).unwrap_or_default() {
        let old = modified.elapsed().is_ok_and(|age| age > FORGET);
        let dead = || read::<Owned>(&path).is_some_and(|entry| entry.owner.is_dead());
        if old || dead() {
            debug!(path = %path.display(), "removing a registration without an owner");
            // Another worker may have been faster.
            let _ = fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_renewal_that_comes_after_the_worker_left_writes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let lease = Arc::new(Lease {
            path: path.clone(),
            json: b"{}".to_vec(),
            writing: Mutex::default(),
        });
        let stop = CancellationToken::new();
        lease.renew(&stop).unwrap();
        assert!(path.exists());
        drop(Leave {
            stop: stop.clone(),
            lease: lease.clone(),
        });
        lease.renew(&stop).unwrap();
        assert!(!path.exists());
    }
}
