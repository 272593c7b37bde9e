//! Whatever is lost, doubled, late or started again between an engine and a subscriber: in the end the subscriber knows
//! what the engine holds.
//!
//! Engine, relay and subscriber are the pure parts of the real ones; queues between them stand for the sockets, and
//! steps drawn at random say what becomes of what is in them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use stator_common::{
    WorkerId,
    events::{
        ViewId,
        follower::{Next, Track, Update},
    },
    proto::kv,
};
use stator_engine::kv_events::{Heard, Numbered};
use stator_kv_relay::{Mirror, Notice};
use stator_router::hash;
use stator_sim::{
    cache::{self, CacheEvent},
    wire::events,
};
use stator_testkit::relay::follow;

const BLOCK: usize = 2;
const BLOCKS: usize = 6;
const PROMPTS: usize = 4;

/// What is drawn.
#[derive(Clone, Debug)]
enum Step {
    /// The engine computes the first blocks of a prompt, as copies from one of them on.
    Store {
        prompt: usize,
        from: usize,
        to: usize,
    },
    /// The engine needs the room of one of its blocks.
    Remove(usize),
    Clear,
    /// The engine is another one.
    Restart,
    /// What the engine publishes next arrives, once or twice, after what comes after it, or not at all.
    Live(Fate),
    /// The relay's question arrives, and so many messages of the answer.
    Answer(usize),
    /// What is still to come of an answer does not; the relay connects again.
    Silence,
    /// The relay looks whether something was missed.
    Check,
    /// The relay publishes what it has.
    Flush,
    Beat,
    /// What the relay publishes next arrives, or does not.
    News(Fate),
    /// The subscriber's question arrives and is answered, or not.
    Snapshot(bool),
    /// The relay is another one.
    Relay,
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Arrives,
    Doubled,
    Late,
    Lost,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Arrives),
        1 => Just(Fate::Doubled),
        1 => Just(Fate::Late),
        1 => Just(Fate::Lost),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..PROMPTS, 0..BLOCKS, 1..=BLOCKS)
            .prop_map(|(prompt, from, to)| Step::Store { prompt, from, to }),
        3 => any::<usize>().prop_map(Step::Remove),
        1 => Just(Step::Clear),
        1 => Just(Step::Restart),
        12 => fate().prop_map(Step::Live),
        6 => (0usize..12).prop_map(Step::Answer),
        1 => Just(Step::Silence),
        1 => Just(Step::Check),
        6 => Just(Step::Flush),
        1 => Just(Step::Beat),
        12 => fate().prop_map(Step::News),
        4 => any::<bool>().prop_map(Step::Snapshot),
        1 => Just(Step::Relay),
    ]
}

/// A prompt: its salt, and its blocks.
fn prompt(number: usize) -> (&'static str, Vec<u32>) {
    // Two share a beginning, the third has the first's tokens and a salt.
    let salt = if number == 2 { "salt" } else { "" };
    let tokens = (0..BLOCK * BLOCKS).map(|at| match (number, at) {
        (1, 4..) | (3, _) => (number * 100 + at) as u32,
        _ => at as u32,
    });
    (salt, tokens.collect())
}

/// An engine: its cache, and what it published.
struct Engine {
    /// Copies by the engine's names, and our name of each.
    cache: BTreeMap<u64, (u32, u64)>,
    seq: u64,
    kept: VecDeque<Numbered>,
    keeps: usize,
}

impl Engine {
    fn new(keeps: usize) -> Self {
        Self {
            cache: BTreeMap::new(),
            seq: 0,
            kept: VecDeque::new(),
            keeps,
        }
    }

    fn publish(&mut self, now: f64, events: &[CacheEvent]) -> Numbered {
        let batch = Numbered {
            seq: self.seq,
            payload: events::encode(now, events, BLOCK, 0).into(),
        };
        self.seq += 1;
        self.kept.push_back(batch.clone());
        if self.kept.len() > self.keeps {
            self.kept.pop_front();
        }
        batch
    }

    fn store(&mut self, number: usize, from: usize, to: usize) -> Option<CacheEvent> {
        let (salt, tokens) = prompt(number);
        let extra = |block: usize| match (block, salt) {
            (0, "salt") => Some(vec![salt.to_owned()]),
            _ => None,
        };
        let mut hashes = Vec::new();
        for (block, tokens) in tokens.chunks(BLOCK).enumerate() {
            let parent = hashes.last().copied();
            let extra = extra(block).unwrap_or_default();
            hashes.push(cache::block_hash(parent, tokens, &extra));
        }
        // What is before the copies is there.
        let there = hashes
            .iter()
            .take_while(|hash| self.cache.contains_key(hash))
            .count();
        let from = from.min(there);
        if from >= to {
            return None;
        }
        let names = hash::blocks(hash::root("", salt), &tokens, BLOCK);
        for block in from..to {
            let copies = self
                .cache
                .entry(hashes[block])
                .or_insert((0, names[block].0));
            copies.0 += 1;
        }
        Some(CacheEvent::Stored {
            hashes: hashes[from..to].to_vec(),
            parent: from.checked_sub(1).map(|before| hashes[before]),
            tokens: tokens[from * BLOCK..to * BLOCK].to_vec(),
            lora: None,
            extra_keys: (from..to).map(extra).collect(),
        })
    }

    fn remove(&mut self, pick: usize) -> Option<CacheEvent> {
        let at = pick.checked_rem(self.cache.len())?;
        let hash = *self.cache.keys().nth(at)?;
        let copies = self.cache.get_mut(&hash)?;
        copies.0 -= 1;
        if copies.0 == 0 {
            self.cache.remove(&hash);
        }
        Some(CacheEvent::Removed { hashes: vec![hash] })
    }

    fn holds(&self) -> BTreeSet<u64> {
        self.cache.values().map(|(_, name)| *name).collect()
    }
}

/// On its way from the engine.
enum Live {
    Batch(Numbered),
    /// The connection ended; the relay made another one.
    Reconnected,
}

struct World {
    now: f64,
    engine: Engine,
    live: VecDeque<Live>,
    question: Option<u64>,
    answer: VecDeque<Heard>,
    relay: Mirror,
    forgot: bool,
    news: VecDeque<kv::Batch>,
    subscriber: Track,
    asked: Option<u64>,
    snapshot: VecDeque<kv::SnapshotPart>,
    known: Option<BTreeSet<u64>>,
}

fn relay() -> Mirror {
    let view = ViewId {
        worker: WorkerId("w".to_owned()),
        dp_rank: 0,
    };
    Mirror::new(view, rand::random)
}

impl World {
    fn new(keeps: usize) -> Self {
        let mut world = Self {
            now: 0.0,
            engine: Engine::new(keeps),
            live: VecDeque::new(),
            question: None,
            answer: VecDeque::new(),
            relay: relay(),
            forgot: false,
            news: VecDeque::new(),
            subscriber: Track::default(),
            asked: None,
            snapshot: VecDeque::new(),
            known: None,
        };
        world.connected();
        world.ask_relay();
        world
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Store { prompt, from, to } => {
                let event = self.engine.store(*prompt, *from, *to);
                self.publish(event);
            }
            Step::Remove(pick) => {
                let event = self.engine.remove(*pick);
                self.publish(event);
            }
            Step::Clear => {
                self.engine.cache.clear();
                self.publish(Some(CacheEvent::Cleared));
            }
            Step::Restart => {
                self.engine = Engine::new(self.engine.keeps);
                self.question = None;
                self.answer.clear();
                self.live.push_back(Live::Reconnected);
            }
            Step::Live(fate) => self.live(*fate),
            Step::Answer(messages) => self.answer(*messages),
            Step::Silence => self.connected(),
            Step::Check => {
                let from = self.relay.check();
                self.ask_engine(from);
            }
            Step::Flush => self.news.extend(self.relay.flush()),
            Step::Beat => {
                self.news.extend(self.relay.flush());
                if self.relay.is_synced() {
                    self.news.push_back(self.relay.heartbeat());
                }
            }
            Step::News(fate) => self.news(*fate),
            Step::Snapshot(arrives) => self.snapshot(*arrives),
            Step::Relay => {
                self.relay = relay();
                self.news.clear();
                self.snapshot.clear();
                self.live.clear();
                self.connected();
                self.subscriber.missed();
                self.ask_relay();
            }
        }
        self.forgot |= self.relay.notices().contains(&Notice::Forgotten);
    }

    fn publish(&mut self, event: Option<CacheEvent>) {
        self.now += 1.0;
        if let Some(event) = event {
            let batch = self.engine.publish(self.now, &[event]);
            self.live.push_back(Live::Batch(batch));
        }
    }

    fn connected(&mut self) {
        self.question = None;
        self.answer.clear();
        let from = self.relay.connected(true);
        self.ask_engine(from);
    }

    fn ask_engine(&mut self, from: Option<u64>) {
        self.question = from.or(self.question);
    }

    fn live(&mut self, fate: Fate) {
        let Some(next) = self.live.pop_front() else {
            return;
        };
        let Live::Batch(batch) = next else {
            self.connected();
            return;
        };
        let times = match fate {
            Fate::Arrives => 1,
            Fate::Doubled => 2,
            Fate::Lost => 0,
            Fate::Late => {
                match self.live.front() {
                    Some(Live::Batch(_)) => self.live.insert(1, Live::Batch(batch)),
                    Some(Live::Reconnected) | None => self.live.push_front(Live::Batch(batch)),
                }
                return;
            }
        };
        for _ in 0..times {
            let from = self.relay.heard(Heard::Live(batch.clone()));
            self.ask_engine(from);
        }
    }

    fn answer(&mut self, messages: usize) {
        // Whoever is not connected to this engine yet does not hear it.
        if self
            .live
            .iter()
            .any(|next| matches!(next, Live::Reconnected))
        {
            return;
        }
        if let Some(from) = self.question.take() {
            let again = self.engine.kept.iter().filter(|batch| batch.seq >= from);
            self.answer.extend(again.cloned().map(Heard::Again));
            self.answer.push_back(Heard::AgainEnd);
        }
        for _ in 0..messages {
            let Some(heard) = self.answer.pop_front() else {
                return;
            };
            let from = self.relay.heard(heard);
            self.ask_engine(from);
        }
    }

    fn news(&mut self, fate: Fate) {
        let Some(batch) = self.news.pop_front() else {
            return;
        };
        let times = match fate {
            Fate::Arrives => 1,
            Fate::Doubled => 2,
            Fate::Lost => 0,
            Fate::Late => {
                self.news.insert(1.min(self.news.len()), batch);
                return;
            }
        };
        for _ in 0..times {
            let next = self.subscriber.batch(batch.clone());
            self.told(next);
        }
    }

    fn ask_relay(&mut self) {
        self.asked = Some(self.subscriber.question());
    }

    fn snapshot(&mut self, arrives: bool) {
        if let Some(number) = self.asked.take() {
            if !self.relay.is_synced() {
                self.asked = Some(number);
                return;
            }
            self.news.extend(self.relay.flush());
            self.snapshot = self.relay.snapshot(number).into();
        }
        while let Some(part) = self.snapshot.pop_front() {
            if !arrives {
                self.snapshot.clear();
                self.ask_relay();
                return;
            }
            let next = self.subscriber.answer(part);
            self.told(next);
        }
    }

    fn told(&mut self, next: Next) {
        for update in next.tell {
            match update {
                Update::Reset { blocks, .. } => {
                    let all: Vec<u64> = blocks.into_iter().flat_map(|b| b.hashes).collect();
                    let known: BTreeSet<u64> = all.iter().copied().collect();
                    assert_eq!(known.len(), all.len(), "told twice");
                    self.known = Some(known);
                }
                Update::Changed(change) => {
                    let known = self.known.as_mut().expect("something was told before");
                    follow(known, change);
                }
                Update::Lost => unreachable!("nobody is silent here"),
            }
        }
        if next.ask {
            self.ask_relay();
        }
    }

    /// Nothing is lost any more, until all that happens has happened.
    fn settle(&mut self) {
        for _ in 0..3 {
            while !self.live.is_empty() {
                self.take(&Step::Live(Fate::Arrives));
            }
            // An answer that was cut off ends in silence.
            self.take(&Step::Silence);
            while self.question.is_some() || !self.answer.is_empty() {
                self.take(&Step::Answer(1));
            }
            self.take(&Step::Beat);
            if self.subscriber.is_waiting() {
                self.ask_relay();
            }
            while !self.news.is_empty() || self.asked.is_some() || !self.snapshot.is_empty() {
                self.take(&Step::Snapshot(true));
                self.take(&Step::News(Fate::Arrives));
            }
        }
        assert!(!self.relay.is_asking() && !self.subscriber.is_waiting());
    }
}

proptest! {
    #[test]
    fn a_subscriber_ends_with_what_the_engine_holds(steps in prop::collection::vec(step(), 0..120)) {
        let mut world = World::new(usize::MAX);
        for step in &steps {
            world.take(step);
        }
        world.settle();
        prop_assert_eq!(world.known.clone(), Some(world.engine.holds()));
        prop_assert!(!world.forgot);
    }

    #[test]
    fn of_an_engine_that_forgets_only_what_is_there_is_known_and_after_a_clear_all(
        steps in prop::collection::vec(step(), 0..120),
        keeps in 1usize..4,
    ) {
        let mut world = World::new(keeps);
        for step in &steps {
            world.take(step);
        }
        world.settle();
        let known = world.known.clone().expect("settled");
        prop_assert!(known.is_subset(&world.engine.holds()));
        if !world.forgot {
            prop_assert_eq!(known, world.engine.holds());
        }
        world.take(&Step::Clear);
        world.take(&Step::Store { prompt: 0, from: 0, to: 3 });
        world.settle();
        prop_assert_eq!(world.known.clone(), Some(world.engine.holds()));
    }
}
