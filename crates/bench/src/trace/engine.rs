//! An engine as far as routing feels it: a paged prefix cache, continuous batching with chunked prefill, and how long a
//! step takes.
//!
//! Blocks are given out for prompt and answer when a request is admitted, so nothing is ever preempted; what nobody
//! uses is kept until its place is needed, the end of the longest unused text first, as in vLLM.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use stator_router::BlockHash;

use super::workload::{BLOCK, Request};

/// Sequences at once.
pub(crate) const MOST_RUNNING: usize = 64;
/// Blocks of the cache: 256 k tokens.
pub(crate) const CAPACITY: usize = 4096;
/// Tokens that one step computes.
pub(crate) const BUDGET: usize = 2048;
/// Seconds of a step without work, per token of a prompt, and per token of context that is decoded from: a model of some
/// 30 billion parameters on a large GPU.
const STEP: f64 = 0.012;
pub(crate) const PREFILL: f64 = 60e-6;
const DECODE: f64 = 40e-9;

/// What a cache did, for those who follow it.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Stored(Vec<BlockHash>),
    Removed(Vec<BlockHash>),
}

/// What a step brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its first token, after so many tokens from the cache.
    First { request: usize, cached: usize },
    /// One more.
    Token { request: usize },
    /// Its last, first or not.
    Done { request: usize },
}

#[derive(Debug)]
struct Sequence {
    number: usize,
    prompt: usize,
    output: usize,
    blocks: Rc<[BlockHash]>,
    cached: usize,
    /// Tokens whose KV is there.
    computed: usize,
    generated: usize,
    /// Blocks that it holds on to, from the first on.
    pinned: usize,
}

#[derive(Debug, Default)]
struct Block {
    users: u32,
    /// When it was let go of.
    stamp: u64,
}

/// One engine.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    blocks: HashMap<BlockHash, Block>,
    /// By stamp; those that were used again since are passed over.
    unused: VecDeque<(u64, BlockHash)>,
    stamp: u64,
    /// Blocks given out and not computed yet.
    reserved: usize,
    /// Blocks that somebody uses.
    used: usize,
    /// Tokens of each running sequence in the step that is under way.
    step: Vec<usize>,
    pub(crate) told: Vec<Told>,
    pub(crate) busy: bool,
}

impl Engine {
    pub(crate) fn submit(&mut self, number: usize, request: &Request) {
        self.waiting.push_back(Sequence {
            number,
            prompt: request.prompt,
            output: request.output.max(1),
            blocks: Rc::clone(&request.blocks),
            cached: 0,
            computed: 0,
            generated: 0,
            pinned: 0,
        });
    }

    /// Returns unfinished requests.
    pub(crate) fn requests(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Returns blocks of a prompt that are in the cache, or will be once those before it are computed.
    pub(crate) fn matched(&self, blocks: &[BlockHash]) -> usize {
        let here = |hash: &&BlockHash| self.blocks.contains_key(hash);
        let now = blocks.iter().take_while(here).count();
        let coming = self.waiting.iter().chain(&self.running);
        let coming = coming.map(|other| {
            let both = other.blocks[..other.prompt / BLOCK].iter().zip(blocks);
            both.take_while(|(a, b)| a == b).count()
        });
        coming.fold(now, usize::max)
    }

    /// Returns the tokens that are to be computed before a new request's.
    pub(crate) fn queued(&self) -> usize {
        let running = self.running.iter();
        let running = running.map(|one| one.prompt.saturating_sub(one.computed));
        let waiting = self.waiting.iter().map(|one| {
            let cached = one.blocks[..one.prompt / BLOCK].iter();
            let cached = cached.take_while(|hash| self.blocks.contains_key(hash));
            one.prompt - (cached.count() * BLOCK).min(one.prompt - 1)
        });
        running.sum::<usize>() + waiting.sum::<usize>()
    }

    /// Returns the tokens that are decoded from.
    pub(crate) fn context(&self) -> usize {
        self.running.iter().map(|one| one.computed).sum()
    }

    /// Returns seconds until a request's first token, if no other came.
    pub(crate) fn forecast(&self, prompt: usize, blocks: &[BlockHash]) -> f64 {
        let cached = (self.matched(blocks) * BLOCK).min(prompt - 1);
        let work = self.queued() + prompt - cached;
        let steps = work.div_ceil(BUDGET).max(1) as f64;
        let step = STEP + DECODE * self.context() as f64;
        let mut wait = 0.0;
        let ahead = self.requests();
        if ahead >= MOST_RUNNING {
            // As many must end before as are too many; the shortest first.
            let mut left: Vec<_> = self
                .running
                .iter()
                .map(|one| one.output - one.generated)
                .collect();
            left.sort_unstable();
            let nth = (ahead - MOST_RUNNING).min(left.len().saturating_sub(1));
            wait = left.get(nth).copied().unwrap_or(0) as f64 * step;
        }
        wait + steps * step + PREFILL * work as f64
    }

    /// Begins a step, if there is work, and returns how long it takes.
    pub(crate) fn begin(&mut self) -> Option<f64> {
        self.admit();
        if self.running.is_empty() {
            return None;
        }
        let mut budget = BUDGET;
        let (mut prefill, mut context) = (0, 0);
        self.step.clear();
        for one in &self.running {
            let tokens = if one.computed < one.prompt {
                let tokens = (one.prompt - one.computed).min(budget);
                prefill += tokens;
                tokens
            } else {
                context += one.computed;
                1.min(budget)
            };
            budget -= tokens;
            self.step.push(tokens);
        }
        Some(STEP + PREFILL * prefill as f64 + DECODE * context as f64)
    }

    /// Ends the step.
    pub(crate) fn end(&mut self, progress: &mut Vec<Progress>) {
        let step = std::mem::take(&mut self.step);
        let mut running = std::mem::take(&mut self.running);
        for (one, tokens) in running.iter_mut().zip(&step) {
            if *tokens == 0 {
                continue;
            }
            let prefilling = one.computed < one.prompt;
            one.computed += tokens;
            if !prefilling || one.computed == one.prompt {
                one.generated += 1;
                let request = one.number;
                progress.push(if one.generated == 1 {
                    let cached = one.cached;
                    Progress::First { request, cached }
                } else {
                    Progress::Token { request }
                });
            }
            self.store(one);
        }
        let mut at = 0;
        while at < running.len() {
            if running[at].generated < running[at].output {
                at += 1;
                continue;
            }
            let done = running.remove(at);
            progress.push(Progress::Done {
                request: done.number,
            });
            self.release(&done);
        }
        self.running = running;
        self.step = step;
    }

    fn admit(&mut self) {
        while self.running.len() < MOST_RUNNING {
            let Some(next) = self.waiting.front() else {
                return;
            };
            let here = |hash: &&BlockHash| self.blocks.contains_key(hash);
            let most = (next.prompt - 1) / BLOCK;
            let cached = next.blocks[..most].iter().take_while(here).count();
            let revived = next.blocks[..cached].iter();
            let revived = revived.filter(|hash| self.blocks[hash].users == 0).count();
            let new = next.blocks.len() - cached;
            if self.used + self.reserved + revived + new > CAPACITY && !self.running.is_empty() {
                return;
            }
            let Some(mut next) = self.waiting.pop_front() else {
                return;
            };
            for hash in &next.blocks[..cached] {
                let block = self.blocks.get_mut(hash).expect("it was there");
                block.users += 1;
            }
            self.used += revived;
            self.reserved += new;
            next.pinned = cached;
            next.cached = cached * BLOCK;
            next.computed = next.cached;
            self.running.push(next);
            self.evict();
        }
    }

    fn evict(&mut self) {
        let mut gone = Vec::new();
        while self.blocks.len() + self.reserved > CAPACITY {
            let Some((stamp, hash)) = self.unused.pop_front() else {
                break;
            };
            let still = self.blocks.get(&hash);
            if still.is_some_and(|block| block.users == 0 && block.stamp == stamp) {
                self.blocks.remove(&hash);
                gone.push(hash);
            }
        }
        if !gone.is_empty() {
            self.told.push(Told::Removed(gone));
        }
    }

    /// Makes the blocks that a sequence has filled known.
    fn store(&mut self, one: &mut Sequence) {
        let full = (one.computed / BLOCK).min(one.blocks.len());
        let mut new = Vec::new();
        for hash in &one.blocks[one.pinned..full] {
            let block = self.blocks.entry(*hash).or_insert_with(|| {
                new.push(*hash);
                Block::default()
            });
            self.used += usize::from(block.users == 0);
            block.users += 1;
            // Whoever computed it a second time gives its own copy back.
            self.reserved -= 1;
        }
        one.pinned = one.pinned.max(full);
        if !new.is_empty() {
            self.told.push(Told::Stored(new));
        }
    }

    fn release(&mut self, done: &Sequence) {
        self.reserved -= done.blocks.len() - done.pinned;
        for hash in done.blocks[..done.pinned].iter().rev() {
            let block = self.blocks.get_mut(hash).expect("it is pinned");
            block.users -= 1;
            if block.users == 0 {
                self.stamp += 1;
                block.stamp = self.stamp;
                self.used -= 1;
                self.unused.push_back((self.stamp, *hash));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(first: u64, prompt: usize, output: usize) -> Request {
        let blocks = (prompt + output) / BLOCK;
        Request {
            at: 0.0,
            prompt,
            output,
            blocks: (0..blocks as u64).map(|n| BlockHash(first + n)).collect(),
        }
    }

    fn run(engine: &mut Engine) -> (f64, Vec<Progress>) {
        let (mut time, mut progress) = (0.0, Vec::new());
        while let Some(step) = engine.begin() {
            time += step;
            engine.end(&mut progress);
        }
        (time, progress)
    }

    #[test]
    fn a_prompt_is_computed_once_and_then_found() {
        let mut engine = Engine::default();
        let asked = request(1000, 640, 64);
        engine.submit(0, &asked);
        let (first, progress) = run(&mut engine);
        assert_eq!(
            progress[0],
            Progress::First {
                request: 0,
                cached: 0
            }
        );
        assert_eq!(*progress.last().unwrap(), Progress::Done { request: 0 });
        assert_eq!(progress.len(), 64 + 1);
        engine.submit(1, &asked);
        let (second, progress) = run(&mut engine);
        let First { cached } = First::of(&progress);
        // The last token is always computed, and with it its block.
        assert_eq!(cached, 576);
        assert!(second < first);
        assert_eq!((engine.used, engine.reserved, engine.requests()), (0, 0, 0));
    }

    struct First {
        cached: usize,
    }

    impl First {
        fn of(progress: &[Progress]) -> Self {
            let Progress::First { cached, .. } = progress[0] else {
                panic!("{progress:?}")
            };
            Self { cached }
        }
    }

    #[test]
    fn a_full_cache_forgets_what_was_unused_longest_from_its_end() {
        let mut engine = Engine::default();
        let prompt = CAPACITY / 2 * BLOCK;
        for n in 0..3 {
            engine.submit(n, &request(100_000 * (n as u64 + 1), prompt, 1));
            run(&mut engine);
        }
        let held = |first: u64| {
            (0..CAPACITY as u64 / 2)
                .filter(|n| engine.blocks.contains_key(&BlockHash(first + n)))
                .count()
        };
        assert_eq!(
            (held(100_000), held(200_000), held(300_000)),
            (0, CAPACITY / 2, CAPACITY / 2)
        );
        assert!(engine.blocks.len() <= CAPACITY);
        let removed = engine.told.iter().filter_map(|told| match told {
            Told::Removed(hashes) => Some(hashes.clone()),
            Told::Stored(_) => None,
        });
        let removed: Vec<_> = removed.flatten().collect();
        assert_eq!(removed[0], BlockHash(100_000 + CAPACITY as u64 / 2 - 1));
    }
}
