//! Who is in the folder, now and after every change.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use notify::Watcher;
use tokio::{
    sync::{Notify, mpsc},
    time::{self, Instant},
};
use tracing::warn;

use super::{Entry, POLL, TTL, list, read};
use crate::{
    Card,
    discovery::{Event, difference},
    ids::WorkerId,
};

pub(super) async fn follow(root: PathBuf, sender: mpsc::Sender<Event>) {
    let changed = Arc::new(Notify::new());
    let mut watcher = notify::recommended_watcher({
        let changed = changed.clone();
        move |event: notify::Result<notify::Event>| {
            // Reading the folder must not cause reading the folder. A renewed lease does: its time is
            // what the scan looks at.
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
    for (path, modified) in folders.flat_map(|folder| list(&folder.path()).unwrap_or_default()) {
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
