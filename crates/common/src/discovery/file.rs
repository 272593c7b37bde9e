//! Discovery through a folder, for one machine (or machines that share a folder).
//!
//! One JSON file per worker, `<root>/<namespace>/<worker id>.json`, written beside and renamed, so that a
//! reader never sees half a card. The lease is the file's modification time, renewed every [`TTL`]` / 3`; a
//! file that was not renewed for [`TTL`] counts as gone, and so does at once the file of a process
//! that died on this host. A file that vanished is written again by its owner.
//!
//! The watcher reads the whole folder on every change (`notify`) and every [`POLL`] anyway:
//! folders are small, and file notifications get lost or do not exist (network file systems).

use std::{
    collections::{BTreeMap, HashMap},
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use notify::Watcher;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    time::{self, Instant},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use super::{
    Discovery, DiscoveryError, Event, Registration, WATCH_BUFFER, Watch, difference, owner::Owner,
};
use crate::{Card, card::is_name, ids::WorkerId, scratch};

/// A worker that did not renew its file for this long is gone.
pub const TTL: Duration = Duration::from_secs(10);

/// How often the folder is read without being told of a change.
pub const POLL: Duration = Duration::from_secs(1);

/// A file this old has no owner any more and is removed by whoever registers next.
const FORGET: Duration = Duration::from_secs(600);

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

impl Files {
    /// Uses the folder `root`, which is made when needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the folder that is used where none is named: `$STATOR_FILE_KV`, else
    /// `$DYN_FILE_KV`, else `discovery` in this user's [`scratch`] folder.
    pub fn default_root() -> PathBuf {
        ["STATOR_FILE_KV", "DYN_FILE_KV"]
            .into_iter()
            .find_map(env::var_os)
            .map_or_else(|| scratch::path().join("discovery"), PathBuf::from)
    }

    fn create(&self) -> Result<(), DiscoveryError> {
        let private = if self.root.starts_with(scratch::path()) {
            scratch::create()
        } else {
            Ok(())
        };
        let created = private.and_then(|()| fs::create_dir_all(&self.root));
        created.map_err(|source| DiscoveryError::Io {
            action: "use",
            path: self.root.clone(),
            source,
        })
    }

    /// Returns the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

#[async_trait]
impl Discovery for Files {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        for name in [&card.endpoint.namespace, &card.worker.0] {
            if !is_name(name) {
                return Err(DiscoveryError::Name(name.clone()));
            }
        }
        self.create()?;
        let folder = self.root.join(&card.endpoint.namespace);
        fs::create_dir_all(&folder).map_err(|source| DiscoveryError::Io {
            action: "create",
            path: folder.clone(),
            source,
        })?;
        sweep(&folder);
        let path = folder.join(format!("{}.json", card.worker));
        let lease = Lease {
            json: serde_json::to_vec_pretty(&Entry {
                owner: Owner::this_process(),
                card,
            })?,
            path,
        };
        lease.write().map_err(|source| DiscoveryError::Io {
            action: "write",
            path: lease.path.clone(),
            source,
        })?;
        let lease = Arc::new(lease);
        let stop = CancellationToken::new();
        tokio::spawn(renew(lease.clone(), stop.clone()));
        Ok(Registration::new(Leave {
            _stop: stop.drop_guard(),
            lease,
        }))
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        // A folder that does not exist yet cannot be watched.
        self.create()?;
        let (sender, events) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(follow(self.root.clone(), sender));
        Ok(Watch { events })
    }
}

/// A worker's file.
struct Lease {
    path: PathBuf,
    json: Vec<u8>,
}

struct Leave {
    _stop: DropGuard,
    lease: Arc<Lease>,
}

impl Drop for Leave {
    fn drop(&mut self) {
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

    fn renew(&self) -> io::Result<()> {
        match fs::File::open(&self.path).and_then(|file| file.set_modified(SystemTime::now())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                warn!(path = %self.path.display(), "registration vanished: writing it again");
                if let Some(folder) = self.path.parent() {
                    fs::create_dir_all(folder)?;
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
        if let Err(error) = lease.renew() {
            warn!(path = %lease.path.display(), %error, "renew the registration");
        }
    }
}

/// Removes files that nobody owns any more.
fn sweep(folder: &Path) {
    for (path, modified) in list(folder) {
        let old = modified.elapsed().is_ok_and(|age| age > FORGET);
        let dead = || read(&path).is_some_and(|entry| entry.owner.is_dead());
        if old || dead() {
            debug!(path = %path.display(), "removing a registration without an owner");
            // Another worker may have been faster.
            let _ = fs::remove_file(&path);
        }
    }
}

async fn follow(root: PathBuf, sender: mpsc::Sender<Event>) {
    let changed = Arc::new(Notify::new());
    let mut watcher = notify::recommended_watcher({
        let changed = changed.clone();
        move |event: notify::Result<notify::Event>| {
            // Renewing a lease is no change; reading the folder must not cause reading the folder.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                changed.notify_one();
            }
        }
    });
    let watching = watcher
        .as_mut()
        .map_err(|error| error.to_string())
        .and_then(|watcher| {
            watcher
                .watch(&root, notify::RecursiveMode::Recursive)
                .map_err(|error| error.to_string())
        });
    if let Err(error) = watching {
        warn!(root = %root.display(), error, poll = ?POLL, "no file notifications: polling");
    }
    let mut seen = HashMap::new();
    let mut known = BTreeMap::new();
    loop {
        let now = scan(&root, &mut seen);
        for event in difference(&known, &now) {
            if sender.send(event).await.is_err() {
                return;
            }
        }
        known = now;
        tokio::select! {
            () = changed.notified() => {}
            () = time::sleep(POLL) => {}
            () = sender.closed() => return,
        }
    }
}

/// What is known of a file between two scans.
struct Seen {
    modified: SystemTime,
    /// When that modification time was first seen, by our own clock: the wall clock may jump.
    since: Instant,
    /// The lease was already over when the file was first seen.
    stale: bool,
    /// Absent: not a card.
    entry: Option<Entry>,
}

/// Returns the workers whose lease holds.
fn scan(root: &Path, seen: &mut HashMap<PathBuf, Seen>) -> BTreeMap<WorkerId, Card> {
    let mut files = HashMap::new();
    let folders = fs::read_dir(root).into_iter().flatten().flatten();
    for (path, modified) in folders.flat_map(|folder| list(&folder.path())) {
        let file = match seen.remove(&path) {
            Some(known) if known.modified == modified => known,
            known => Seen {
                modified,
                since: Instant::now(),
                stale: known.is_none() && modified.elapsed().is_ok_and(|age| age > TTL),
                entry: read(&path),
            },
        };
        files.insert(path, file);
    }
    *seen = files;
    seen.values()
        .filter(|file| !file.stale && file.since.elapsed() <= TTL)
        .filter_map(|file| file.entry.as_ref())
        .filter(|entry| !entry.owner.is_dead())
        .map(|entry| (entry.card.worker.clone(), entry.card.clone()))
        .collect()
}

/// Returns the files of a folder that may be cards; none if it cannot be read.
fn list(folder: &Path) -> Vec<(PathBuf, SystemTime)> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        })
        .filter_map(|path| {
            let modified = fs::metadata(&path).and_then(|data| data.modified()).ok()?;
            Some((path, modified))
        })
        .collect()
}

fn read(path: &Path) -> Option<Entry> {
    let json = fs::read(path).ok()?;
    match serde_json::from_slice(&json) {
        Ok(entry) => Some(entry),
        Err(error) => {
            warn!(path = %path.display(), %error, "not a worker's card");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{
        owner::{host, start_of},
        tests::card,
    };

    fn gone(worker: &str) -> Option<Event> {
        Some(Event::Gone(WorkerId(worker.to_owned())))
    }

    fn put(worker: &str) -> Option<Event> {
        Some(Event::Put(Box::new(card(worker))))
    }

    fn path(root: &Path, worker: &str) -> PathBuf {
        root.join("test").join(format!("{worker}.json"))
    }

    #[tokio::test]
    async fn a_watcher_learns_of_workers_that_were_there_come_and_leave() {
        let root = tempfile::tempdir().unwrap();
        let files = Files::new(root.path());
        let first = files.register(card("a")).await.unwrap();
        let mut watch = files.watch().await.unwrap();
        assert_eq!(watch.next().await, put("a"));
        let second = files.register(card("b")).await.unwrap();
        assert_eq!(watch.next().await, put("b"));
        drop(first);
        assert_eq!(watch.next().await, gone("a"));
        drop(second);
        assert_eq!(watch.next().await, gone("b"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_vanished_file_is_written_again() {
        let root = tempfile::tempdir().unwrap();
        let files = Files::new(root.path());
        let _registration = files.register(card("a")).await.unwrap();
        let mut watch = files.watch().await.unwrap();
        assert_eq!(watch.next().await, put("a"));
        fs::remove_file(path(root.path(), "a")).unwrap();
        assert_eq!(watch.next().await, gone("a"));
        assert_eq!(watch.next().await, put("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_nobody_renews_ends() {
        let root = tempfile::tempdir().unwrap();
        let files = Files::new(root.path());
        let registration = files.register(card("a")).await.unwrap();
        // A process of another host: its lease is all that is known of it.
        let file = path(root.path(), "a");
        let mut entry = read(&file).unwrap();
        entry.owner.host = "elsewhere".to_owned();
        entry.card.worker = WorkerId("b".to_owned());
        fs::write(path(root.path(), "b"), serde_json::to_vec(&entry).unwrap()).unwrap();
        drop(registration);
        let mut watch = files.watch().await.unwrap();
        assert_eq!(watch.next().await, put("b"));
        assert_eq!(watch.next().await, gone("b"));
    }

    #[tokio::test]
    async fn a_worker_whose_process_died_on_this_host_is_gone_at_once() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let root = tempfile::tempdir().unwrap();
        let entry = Entry {
            owner: Owner {
                host: host(),
                pid: child.id(),
                start: start_of(child.id()).unwrap(),
            },
            card: card("a"),
        };
        fs::create_dir(root.path().join("test")).unwrap();
        fs::write(path(root.path(), "a"), serde_json::to_vec(&entry).unwrap()).unwrap();
        let mut watch = Files::new(root.path()).watch().await.unwrap();
        assert_eq!(watch.next().await, put("a"));
        // A zombie until it is waited for, which counts as dead.
        child.kill().unwrap();
        assert_eq!(watch.next().await, gone("a"));
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_no_card_is_skipped() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("test")).unwrap();
        fs::write(path(root.path(), "x"), "{").unwrap();
        let files = Files::new(root.path());
        let mut watch = files.watch().await.unwrap();
        let _registration = files.register(card("a")).await.unwrap();
        assert_eq!(watch.next().await, put("a"));
    }

    #[tokio::test]
    async fn a_name_that_leaves_the_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let result = Files::new(root.path()).register(card("../a")).await;
        assert!(matches!(result.err(), Some(DiscoveryError::Name(_))));
    }
}
