//! What the indices are told, in terms of none of them.
//!
//! A block has a hash of its own tokens and one of all tokens up to it; peers want both.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use stator_router::hash;

/// Tokens per block.
pub const BLOCK: usize = 16;

/// A block, as different indices name it.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Of its own tokens.
    pub content: u64,
    /// Of all tokens up to its end, as the engine has it.
    pub engine: u64,
    /// The same, as we have it.
    pub ours: u64,
}

/// A prompt's blocks in each index's words.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub blocks: Vec<Block>,
    pub ours: Vec<stator_router::BlockHash>,
    pub dynamo: Vec<dynamo_kv_router::protocols::LocalBlockHash>,
    pub chain: Vec<kv_index::ContentHash>,
}

#[derive(Clone, Debug)]
pub enum What {
    Store {
        /// The engine's name of the block before.
        parent: Option<u64>,
        /// Blocks before.
        position: u32,
        blocks: Vec<Block>,
    },
    Remove {
        blocks: Vec<Block>,
    },
}

#[derive(Clone, Debug)]
pub struct Event {
    pub worker: usize,
    pub what: What,
}

#[derive(Clone, Debug)]
pub struct Corpus {
    pub workers: usize,
    pub events: Vec<Event>,
    /// To be looked up.
    pub prompts: Vec<Prompt>,
}

/// Returns a prompt that begins as `before` does for `shared` blocks.
fn prompt(random: &mut StdRng, before: &[Block], shared: usize, len: usize) -> Vec<Block> {
    let mut blocks = before[..shared].to_vec();
    while blocks.len() < len {
        let tokens: [u32; BLOCK] = random.random();
        let root = hash::root("", "");
        let parent = blocks
            .last()
            .map_or(root, |last: &Block| stator_router::BlockHash(last.ours));
        blocks.push(Block {
            content: hash::chain(root, &tokens, &[]).0,
            engine: random.random(),
            ours: hash::chain(parent, &tokens, &[]).0,
        });
    }
    blocks
}

impl Prompt {
    fn new(blocks: Vec<Block>) -> Self {
        let each = blocks.iter();
        Self {
            ours: each
                .clone()
                .map(|b| stator_router::BlockHash(b.ours))
                .collect(),
            dynamo: each
                .clone()
                .map(|b| dynamo_kv_router::protocols::LocalBlockHash(b.content))
                .collect(),
            chain: each.map(|b| kv_index::ContentHash(b.content)).collect(),
            blocks,
        }
    }
}

fn store(worker: usize, blocks: &[Block], from: usize, to: usize) -> Event {
    Event {
        worker,
        what: What::Store {
            parent: (from > 0).then(|| blocks[from - 1].engine),
            position: from as u32,
            blocks: blocks[from..to].to_vec(),
        },
    }
}

impl Corpus {
    /// 64 workers, each with 100 prompts of 128 blocks, of which 64 are shared by all workers.
    pub fn fleet() -> Self {
        let mut random = StdRng::seed_from_u64(1);
        let (workers, groups) = (64, 100);
        let mut events = Vec::new();
        let mut prompts = Vec::new();
        for _ in 0..groups {
            let shared = prompt(&mut random, &[], 0, 64);
            for worker in 0..workers {
                let blocks = prompt(&mut random, &shared, 64, 128);
                events.push(store(worker, &blocks, 0, 128));
                prompts.push(Prompt::new(blocks));
            }
        }
        Self {
            workers,
            events,
            prompts: prompts.into_iter().step_by(13).collect(),
        }
    }

    /// One prompt of 128 blocks, held by so many workers, among others.
    pub fn held_by(holders: usize) -> Self {
        let mut random = StdRng::seed_from_u64(2);
        let workers = 256;
        let mut events: Vec<_> = (0..1000)
            .map(|n| store(n % workers, &prompt(&mut random, &[], 0, 128), 0, 128))
            .collect();
        let asked = prompt(&mut random, &[], 0, 128);
        events.extend((0..holders).map(|worker| store(worker, &asked, 0, 128)));
        Self {
            workers,
            events,
            prompts: vec![Prompt::new(asked)],
        }
    }

    /// Prompts that nobody holds.
    pub fn strangers() -> Vec<Prompt> {
        let mut random = StdRng::seed_from_u64(3);
        (0..200)
            .map(|_| Prompt::new(prompt(&mut random, &[], 0, 128)))
            .collect()
    }

    /// 64 workers with caches of 8,192 blocks, full of conversations that grow turn by turn and of which the one that
    /// was idle longest makes room, from its end, a few blocks at a time.
    pub fn churn() -> Self {
        let mut random = StdRng::seed_from_u64(4);
        let (workers, capacity) = (64, 8192);
        let systems: Vec<_> = (0..20).map(|_| prompt(&mut random, &[], 0, 32)).collect();
        let mut events = Vec::new();
        for worker in 0..workers {
            // Conversations by last use; of each how many blocks are there.
            let mut talks: std::collections::VecDeque<(Vec<Block>, usize)> = Default::default();
            let mut held = 0;
            let mut refs = std::collections::HashMap::<u64, u32>::new();
            for _ in 0..400 {
                let (talk, there) = if talks.len() > 20 && random.random_bool(0.7) {
                    let nth = random.random_range(talks.len() / 2..talks.len());
                    talks.remove(nth).expect("in range")
                } else {
                    (systems.choose(&mut random).expect("some").clone(), 0)
                };
                let len = talk.len() + random.random_range(4..40);
                let grown = prompt(&mut random, &talk, talk.len(), len);
                // A prefix may be there through another conversation.
                let mut at = there;
                while at < grown.len() && refs.contains_key(&grown[at].engine) {
                    at += 1;
                }
                for block in &grown[there..] {
                    *refs.entry(block.engine).or_default() += 1;
                }
                if at < grown.len() {
                    events.push(store(worker, &grown, at, grown.len()));
                    held += grown.len() - at;
                }
                let len = grown.len();
                talks.push_back((grown, len));
                while held > capacity {
                    let (oldest, there) = talks.front_mut().expect("something is held");
                    let count = random.random_range(1..=8).min(*there);
                    let mut gone = Vec::new();
                    for block in oldest[*there - count..*there].iter().rev() {
                        let left = refs.get_mut(&block.engine).expect("it is held");
                        *left -= 1;
                        if *left == 0 {
                            refs.remove(&block.engine);
                            gone.push(*block);
                        }
                    }
                    *there -= count;
                    let none = *there == 0;
                    held -= gone.len();
                    if !gone.is_empty() {
                        let what = What::Remove { blocks: gone };
                        events.push(Event { worker, what });
                    }
                    if none {
                        talks.pop_front();
                    }
                }
            }
        }
        // Workers tell at the same time: events of each stay in order.
        let mut queues: Vec<std::collections::VecDeque<Event>> = vec![Default::default(); workers];
        for event in events {
            queues[event.worker].push_back(event);
        }
        let mut mixed = Vec::new();
        while queues.iter().any(|queue| !queue.is_empty()) {
            let worker = random.random_range(0..workers);
            mixed.extend(queues[worker].pop_front());
        }
        Self {
            workers,
            events: mixed,
            prompts: Vec::new(),
        }
    }

    /// Returns how many pairs of block and worker there are at the end.
    pub fn held(&self) -> usize {
        let sum = |stored: bool| {
            let events = self.events.iter();
            let blocks = events.map(|event| match &event.what {
                What::Store { blocks, .. } if stored => blocks.len(),
                What::Remove { blocks } if !stored => blocks.len(),
                What::Store { .. } | What::Remove { .. } => 0,
            });
            blocks.sum::<usize>()
        };
        sum(true) - sum(false)
    }

    /// Takes everything away again, from the ends.
    pub fn removals(&self) -> Vec<Event> {
        let stores = self.events.iter().rev();
        stores
            .filter_map(|event| {
                let What::Store { blocks, .. } = &event.what else {
                    return None;
                };
                let blocks = blocks.iter().rev().copied().collect();
                Some(Event {
                    worker: event.worker,
                    what: What::Remove { blocks },
                })
            })
            .collect()
    }
}
