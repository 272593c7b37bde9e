//! An engine, what it says of its own cache, and what a follower knows of it.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    time::Duration,
};

use stator_common::{
    WorkerId,
    events::{
        Events, Follower, Medium, ViewId,
        follower::{Patience, Update},
    },
    nats::Nats,
};
use stator_engine::{
    Engine, Finish, Request, Sampling, Step, StepSink, Tokens,
    kv_events::{Endpoints, Heard, KvEvent, Source, decode},
};
use stator_kv_relay::{Place, Relay};
use stator_router::hash::{self, BlockHash};
use stator_testkit::{relay::follow, wait::PATIENCE};
use tokio::{sync::mpsc, time};

pub(crate) fn view() -> ViewId {
    ViewId {
        worker: WorkerId("agg-1".to_owned()),
        dp_rank: 0,
    }
}

/// Returns a place on this machine.
pub(crate) fn on_port(port: u16) -> Place {
    let host = [127, 0, 0, 1].into();
    Place::Zmq { host, port }
}

/// Starts a relay of one engine.
pub(crate) async fn relay(place: &Place, endpoints: &Endpoints) -> Relay {
    let relay = loop {
        // A relay that was just ended lets go of its ports a moment later.
        match Relay::bind(place.clone()).await {
            Ok(relay) => break relay,
            Err(_) => time::sleep(Duration::from_millis(10)).await,
        }
    };
    relay.keep(view(), endpoints.clone());
    relay
}

/// What a follower knows.
pub(crate) struct Known {
    follower: Follower,
    events: Events,
    blocks: Option<BTreeSet<u64>>,
    resets: usize,
}

impl Known {
    pub(crate) fn follow(relay: &Relay, nats: Nats) -> Self {
        let patience = Patience {
            silence: Duration::from_secs(3),
            ..Patience::default()
        };
        let (follower, events) = Follower::new(patience, nats);
        follower.follow(&view().worker, 1, &relay.advertised("127.0.0.1"));
        Self {
            follower,
            events,
            blocks: None,
            resets: 0,
        }
    }

    async fn next(&mut self) {
        let event = time::timeout(PATIENCE, self.events.next()).await;
        let event = event.expect("news in time").expect("a follower");
        assert_eq!(event.view, view());
        match event.update {
            Update::Reset { blocks, .. } => {
                assert!(blocks.iter().all(|blocks| blocks.medium == Medium::Gpu));
                self.blocks = Some(blocks.into_iter().flat_map(|b| b.hashes).collect());
                self.resets += 1;
            }
            Update::Lost => self.blocks = None,
            Update::Changed(change) => {
                let known = self.blocks.as_mut().expect("a reset before");
                follow(known, change);
            }
        }
    }

    /// Waits until exactly these blocks are known.
    pub(crate) async fn until(&mut self, wanted: &BTreeSet<u64>) {
        while self.blocks.as_ref() != Some(wanted) {
            self.next().await;
        }
    }

    /// Waits until nothing is known.
    pub(crate) async fn until_lost(&mut self) {
        while self.blocks.is_some() {
            self.next().await;
        }
    }

    /// Asks for all of it again.
    pub(crate) async fn resynced(&mut self) {
        let before = self.resets;
        self.follower.resync(&view());
        while self.resets == before {
            self.next().await;
        }
    }
}

/// Asks an engine for all that it ever told of its cache, and takes the sum, in the plainest way.
///
/// - `seen`: batches that it must have told.
pub(crate) async fn said(endpoints: &Endpoints, seen: u64) -> BTreeSet<u64> {
    let mut source = Source::connect(endpoints).await.expect("an engine");
    loop {
        let mut copies: HashMap<u64, u32> = HashMap::new();
        let mut names: HashMap<u64, BlockHash> = HashMap::new();
        let mut batches = 0;
        source.ask(0).await.expect("asked");
        loop {
            let heard = time::timeout(PATIENCE, source.hear()).await;
            let batch = match heard.expect("an answer").expect("an engine") {
                Heard::Again(batch) => batch,
                Heard::Live(_) => continue,
                Heard::AgainEnd => break,
            };
            assert_eq!(batch.seq, batches);
            batches += 1;
            for event in decode(&batch.payload).expect("a batch").events {
                match event {
                    KvEvent::Stored(stored) => {
                        let mut parent = match stored.parent {
                            Some(parent) => names[&parent],
                            None => hash::root("", ""),
                        };
                        let tokens = stored.tokens.chunks(stored.block_size as usize);
                        for (engine, tokens) in stored.hashes.iter().zip(tokens) {
                            parent = hash::chain(parent, tokens, &[]);
                            names.insert(*engine, parent);
                            *copies.entry(*engine).or_default() += 1;
                        }
                    }
                    KvEvent::Removed(removed) => {
                        for engine in removed.hashes {
                            *copies.get_mut(&engine).expect("stored before") -= 1;
                        }
                    }
                    KvEvent::Cleared => copies.clear(),
                }
            }
        }
        if batches >= seen {
            return copies
                .into_iter()
                .filter(|(_, copies)| *copies > 0)
                .map(|(engine, _)| names[&engine].0)
                .collect();
        }
    }
}

/// Returns the names of the full blocks of a prompt.
pub(crate) fn names(prompt: Range<u32>, block_size: usize) -> BTreeSet<u64> {
    let tokens: Vec<u32> = prompt.collect();
    let names = hash::blocks(hash::root("", ""), &tokens, block_size);
    names.into_iter().map(|name| name.0).collect()
}

/// What comes out of an engine.
pub(crate) struct Outputs(mpsc::UnboundedReceiver<Step>);

pub(crate) fn outputs() -> (impl StepSink, Outputs) {
    let (sender, steps) = mpsc::unbounded_channel();
    let sink = move |step: Step| {
        let _ = sender.send(step);
    };
    (sink, Outputs(steps))
}

/// Has an engine compute a prompt and one token after it.
pub(crate) async fn compute(engine: &Engine, outputs: &mut Outputs, prompt: Range<u32>) {
    let prompt: Vec<u32> = prompt.collect();
    let request = Request {
        id: "r".to_owned(),
        prompt: Tokens::from(prompt.as_slice()),
        sampling: Sampling {
            temperature: Some(0.0),
            max_tokens: 1,
            ignore_eos: true,
            ..Sampling::default()
        },
        ..Request::default()
    };
    let handle = engine.submit(request).expect("submit");
    loop {
        let step = time::timeout(PATIENCE, outputs.0.recv()).await;
        let step = step.expect("a step in time").expect("an engine");
        let mut own = step.outputs.iter().filter(|out| out.key == handle.key());
        if own.any(|out| out.finish == Some(Finish::Length)) {
            return;
        }
    }
}
