//! A relay on the real event plane that says of caches what a test says.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use prost::Message;
use stator_common::WorkerId;
use stator_common::card::KvEvents;
use stator_common::events::plane::{Outlet as _, Question};
use stator_common::events::{Blocks, Change, Medium, ViewId, zmq};
use stator_common::proto::kv;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How often a view is said to be alive.
const HEARTBEAT: Duration = Duration::from_millis(50);

/// A relay of views, until it is dropped.
pub struct Relay {
    said: mpsc::UnboundedSender<(ViewId, Said)>,
    snapshots: Arc<AtomicU32>,
    events: KvEvents,
    task: JoinHandle<()>,
}

/// Takes a change into what a subscriber knows of a cache of one medium.
///
/// # Panics
/// It says something that is so already.
pub fn follow(known: &mut BTreeSet<u64>, change: Change) {
    match change {
        Change::Stored(blocks) => {
            for hash in blocks.hashes {
                assert!(known.insert(hash), "stored twice");
            }
        }
        Change::Removed(blocks) => {
            for hash in blocks.hashes {
                assert!(known.remove(&hash), "removed without being there");
            }
        }
        Change::Cleared(_) => known.clear(),
    }
}

enum Said {
    Change(Change),
    /// Nobody is told: what subscribers know is wrong from now on.
    Secretly(Change),
}

/// What a view holds, and how often that changed.
#[derive(Default)]
struct View {
    seq: u64,
    held: BTreeMap<Medium, BTreeSet<u64>>,
}

struct Task {
    outlet: zmq::Outlet,
    views: BTreeMap<ViewId, View>,
    snapshots: Arc<AtomicU32>,
}

impl Relay {
    /// Starts a relay of empty views.
    pub async fn start(views: impl IntoIterator<Item = ViewId>) -> Self {
        let outlet = zmq::Outlet::bind([127, 0, 0, 1].into(), 0).await;
        let outlet = outlet.expect("free ports");
        let events = KvEvents {
            relay: Some(outlet.ports().advertised("127.0.0.1")),
            engines: Vec::new(),
        };
        let snapshots = Arc::new(AtomicU32::new(0));
        let (said, to_say) = mpsc::unbounded_channel();
        let task = Task {
            outlet,
            views: views
                .into_iter()
                .map(|view| (view, View::default()))
                .collect(),
            snapshots: Arc::clone(&snapshots),
        };
        Self {
            said,
            snapshots,
            events,
            task: tokio::spawn(task.run(to_say)),
        }
    }

    /// Returns what the card of a worker says whose views are here.
    pub fn events(&self) -> KvEvents {
        self.events.clone()
    }

    /// Returns how many snapshots were asked for.
    pub fn snapshots(&self) -> u32 {
        self.snapshots.load(Ordering::SeqCst)
    }

    /// Says that a view changed.
    pub fn say(&self, view: &ViewId, change: Change) {
        self.send(view, Said::Change(change));
    }

    /// Changes a view without saying so.
    pub fn keep_quiet(&self, view: &ViewId, change: Change) {
        self.send(view, Said::Secretly(change));
    }

    fn send(&self, view: &ViewId, said: Said) {
        let sent = self.said.send((view.clone(), said));
        assert!(sent.is_ok(), "the relay runs");
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Task {
    async fn run(mut self, mut to_say: mpsc::UnboundedReceiver<(ViewId, Said)>) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                question = self.outlet.asked() => match question {
                    Ok(question) => self.answer(&question).await,
                    Err(_) => return,
                },
                said = to_say.recv() => match said {
                    Some((view, Said::Change(change))) => {
                        self.change(&view, &change);
                        self.publish(&view, vec![change.to_proto()]).await;
                    }
                    Some((view, Said::Secretly(change))) => {
                        let state = self.views.entry(view).or_default();
                        state.apply(&change);
                    }
                    None => return,
                },
                _ = heartbeat.tick() => {
                    let views: Vec<_> = self.views.keys().cloned().collect();
                    for view in views {
                        self.publish(&view, Vec::new()).await;
                    }
                }
            }
        }
    }

    fn change(&mut self, view: &ViewId, change: &Change) {
        let state = self.views.entry(view.clone()).or_default();
        state.seq += 1;
        state.apply(change);
    }

    async fn publish(&mut self, view: &ViewId, changes: Vec<kv::Change>) {
        let batch = kv::Batch {
            worker: view.worker.0.clone(),
            dp_rank: view.dp_rank,
            epoch: 1,
            seq: self.views[view].seq,
            changes,
        };
        self.outlet
            .publish(&view.topic(), batch.encode_to_vec().into())
            .await;
    }

    async fn answer(&mut self, question: &Question) {
        let asked = kv::SnapshotRequest::decode(question.question.clone());
        let asked = asked.expect("subscribers ask in protobuf");
        self.snapshots.fetch_add(1, Ordering::SeqCst);
        let view = ViewId {
            worker: WorkerId(asked.worker.clone()),
            dp_rank: asked.dp_rank,
        };
        let part = |seq, blocks, last| kv::SnapshotPart {
            worker: asked.worker.clone(),
            dp_rank: asked.dp_rank,
            number: asked.number,
            epoch: 1,
            seq,
            blocks,
            last,
            unknown: false,
        };
        let mut parts = Vec::new();
        if let Some(state) = self.views.get(&view) {
            for (&medium, hashes) in &state.held {
                let hashes = hashes.iter().copied().collect();
                let blocks = Blocks { medium, hashes }.to_proto();
                parts.push(part(state.seq, Some(blocks), false));
            }
            parts.push(part(state.seq, None, true));
        } else {
            parts.push(kv::SnapshotPart {
                unknown: true,
                ..part(0, None, true)
            });
        }
        for part in parts {
            let part = part.encode_to_vec().into();
            self.outlet.answer(&question.asker, part).await;
        }
    }
}

impl View {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Stored(blocks) => {
                let held = self.held.entry(blocks.medium).or_default();
                held.extend(&blocks.hashes);
            }
            Change::Removed(blocks) => {
                let held = self.held.entry(blocks.medium).or_default();
                held.retain(|hash| !blocks.hashes.contains(hash));
            }
            Change::Cleared(medium) => {
                self.held
                    .retain(|held, _| medium.is_some_and(|medium| medium != *held));
            }
        }
    }
}
