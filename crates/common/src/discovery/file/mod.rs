//! Discovery through a folder, for one machine (or machines that share a folder).
//!
//! One JSON file per worker, `<root>/<namespace>/<worker id>.json`, written beside and renamed, so that a
//! reader never sees half a card. The lease is the file's modification time, renewed every [`TTL`]` / 3`; a
//! file that was not renewed for [`TTL`] counts as gone, and so does at once the file of a process
//! that died on this host. A file that vanished is written again by its owner.
//!
//! The watcher reads the whole folder on every change (`notify`) and every [`POLL`] anyway:
//! folders are small, and file notifications get lost or do not exist (network file systems).
//!
//! Processors have a file each in `<root>/.peers/processors`, which are kept in the same way.

mod lease;
mod scan;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Discovery, DiscoveryError, Peer, Registration, WATCH_BUFFER, Watch, owner::Owner};
use crate::{Card, card::is_name, scratch};

/// A worker that did not renew its file for this long is gone.
pub const TTL: Duration = Duration::from_secs(10);

/// How often the folder is read without being told of a change.
pub const POLL: Duration = Duration::from_secs(1);

/// A folder as the place of discovery.
#[derive(Clone, Debug)]
pub struct Files {
    root: PathBuf,
}

/// What a file holds: the card, and whose process it is.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    owner: Owner,
    card: Card,
}

/// The same of a processor.
#[derive(Debug, Serialize, Deserialize)]
struct PeerEntry {
    owner: Owner,
    peer: Peer,
}

/// What both say.
#[derive(Debug, Deserialize)]
struct Owned {
    owner: Owner,
}

/// Below the root: where processors are. No namespace is called so, and it is one folder deeper than cards are looked for.
const PEERS: &str = ".peers/processors";

impl Files {
    /// Uses the folder `root`, which is made when needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the folder that is used where none is named: `discovery` in this user's [`scratch`] folder.
    pub fn default_root() -> PathBuf {
        scratch::path().join("discovery")
    }

    fn create(&self) -> Result<(), DiscoveryError> {
        let private = if self.root.starts_with(scratch::path()) {
            scratch::create()
        } else {
            Ok(())
        };
        let created = private.and_then(|()| create_unshared(&self.root));
        created.map_err(|source| DiscoveryError::Io {
            action: "use",
            path: self.root.clone(),
            source,
        })
    }

    /// Keeps a file in a folder below the root until what is returned is dropped.
    fn keep(
        &self,
        folder: &str,
        name: &str,
        entry: &impl Serialize,
    ) -> Result<Registration, DiscoveryError> {
        if !is_name(name) {
            return Err(DiscoveryError::Name(name.to_owned()));
        }
        self.create()?;
        let folder = self.root.join(folder);
        create_unshared(&folder).map_err(|source| DiscoveryError::Io {
            action: "create",
            path: folder.clone(),
            source,
        })?;
        lease::sweep(&folder);
        let path = folder.join(format!("{name}.json"));
        let json = serde_json::to_vec_pretty(entry)?;
        let leave = lease::hold(path.clone(), json).map_err(|source| DiscoveryError::Io {
            action: "write",
            path,
            source,
        })?;
        Ok(Registration::new(leave))
    }

    /// Returns the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

#[async_trait]
impl Discovery for Files {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        let namespace = card.endpoint.namespace.clone();
        if !is_name(&namespace) {
            return Err(DiscoveryError::Name(namespace));
        }
        let name = card.worker.0.clone();
        let owner = Owner::this_process();
        self.keep(&namespace, &name, &Entry { owner, card })
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        // A folder that does not exist yet cannot be watched.
        self.create()?;
        let (sender, events) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(scan::follow(self.root.clone(), sender));
        Ok(Watch { events })
    }

    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError> {
        let name = peer.name.clone();
        let owner = Owner::this_process();
        self.keep(PEERS, &name, &PeerEntry { owner, peer })
    }

    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError> {
        let folder = self.root.join(PEERS);
        let files = list(&folder).map_err(|source| DiscoveryError::Io {
            action: "read",
            path: folder,
            source,
        })?;
        // A clock that was set back makes files seem to come from the future.
        let held = files
            .into_iter()
            .filter(|(_, modified)| modified.elapsed().is_ok_and(|age| age <= TTL));
        let entries = held.filter_map(|(path, _)| read::<PeerEntry>(&path));
        let alive = entries.filter(|entry| !entry.owner.is_dead());
        Ok(alive.map(|entry| entry.peer).collect())
    }

    fn name(&self) -> String {
        format!("files in {}", self.root.display())
    }
}

/// Creates a folder that others may read but not write to, if it is missing.
///
/// # Errors
/// Somebody else can write to it, who could then name workers of his own and be sent everybody's
/// prompts.
fn create_unshared(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)?;
    let data = fs::metadata(path)?;
    let (owner, mode) = (data.uid(), data.permissions().mode());
    let trusted = [0, nix::unistd::Uid::effective().as_raw()].contains(&owner);
    if trusted && mode & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "other users can write to it (owner {owner}, mode {:o}) and so be sent everybody's prompts: \
         chmod -R go-w it, or name a folder of this user's own",
        mode & 0o7777
    )))
}

/// Returns the files of a folder that may be cards; none of one that does not exist.
///
/// # Errors
/// It cannot be read: nobody to be seen is not nobody there.
fn list(folder: &Path) -> io::Result<Vec<(PathBuf, SystemTime)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let files = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        })
        .filter_map(|path| {
            let modified = fs::metadata(&path).and_then(|data| data.modified()).ok()?;
            Some((path, modified))
        });
    Ok(files.collect())
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let json = fs::read(path).ok()?;
    match serde_json::from_slice(&json) {
        Ok(entry) => Some(entry),
        Err(error) => {
            warn!(path = %path.display(), %error, "not a registration");
            None
        }
    }
}
