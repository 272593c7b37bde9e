//! What clients ask for, and when: made up from a seed, in the shape of two kinds of real use.
//!
//! Times do not depend on the answers, so that every policy gets the same requests at the same moments.

use std::rc::Rc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stator_router::BlockHash;

/// Tokens per block of the simulated engines.
pub(crate) const BLOCK: usize = 64;

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Seconds.
    pub(crate) at: f64,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Tokens to generate.
    pub(crate) output: usize,
    /// Names of all full blocks, prompt and output.
    pub(crate) blocks: Rc<[BlockHash]>,
}

impl Request {
    /// Returns the names of the prompt's full blocks.
    pub(crate) fn prompt_blocks(&self) -> &[BlockHash] {
        &self.blocks[..self.prompt / BLOCK]
    }

    /// Returns the names of the blocks that a cache may save: not that of the last token, which is computed in any case.
    pub(crate) fn useful_blocks(&self) -> &[BlockHash] {
        let blocks = self.prompt_blocks();
        &blocks[..blocks.len().min((self.prompt - 1) / BLOCK)]
    }

    /// Returns what a prefill worker is asked for.
    pub(crate) fn prompt_alone(&self) -> Self {
        Self {
            at: self.at,
            prompt: self.prompt,
            output: 1,
            blocks: self.prompt_blocks().into(),
        }
    }
}

/// A kind of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Conversations of some turns behind a few system prompts, as assistants have them: most of each prompt was
    /// there in the turn before.
    Conversations,
    /// Long prompts of which half is shared, some parts by very many, as in the traces that Mooncake published (FAST '25):
    /// lengths with a long tail, answers of some hundred tokens, most prefixes never asked for again.
    Mooncake,
}

impl Workload {
    pub(crate) const ALL: [Self; 2] = [Self::Conversations, Self::Mooncake];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::Mooncake => "mooncake-shaped",
        }
    }

    /// Returns the requests of so many seconds, in order.
    ///
    /// - `workers`: the rates grow with them.
    pub(crate) fn requests(self, seconds: f64, workers: usize, seed: u64) -> Vec<Request> {
        let mut maker = Maker {
            random: StdRng::seed_from_u64(seed),
            next: 1,
            requests: Vec::new(),
        };
        match self {
            Self::Conversations => maker.conversations(seconds, workers),
            Self::Mooncake => maker.mooncake(seconds, workers),
        }
        let mut requests = maker.requests;
        requests.retain(|request| request.at < seconds);
        requests.sort_by(|a, b| a.at.total_cmp(&b.at));
        requests
    }
}

struct Maker {
    random: StdRng,
    /// The next block's name.
    next: u64,
    requests: Vec<Request>,
}

/// Text that grows: names of its full blocks, and its length.
#[derive(Clone, Default)]
struct Text {
    blocks: Vec<BlockHash>,
    tokens: usize,
}

impl Maker {
    /// New conversations per second and worker.
    const TALKS: f64 = 0.5;
    /// New prompts per second and worker.
    const PROMPTS: f64 = 1.6;

    fn conversations(&mut self, seconds: f64, workers: usize) {
        let systems: Vec<Text> = (0..12)
            .map(|_| {
                let tokens = self.random.random_range(500..4000);
                self.grown(&Text::default(), tokens)
            })
            .collect();
        let mut at = 0.0;
        while at < seconds {
            at += self.pause(1.0 / (Self::TALKS * workers as f64));
            // A few assistants are asked far more than the others.
            let system = self.rank(systems.len());
            let mut text = systems[system].clone();
            let turns = 1 + self.pause(6.0) as usize;
            let mut now = at;
            for _ in 0..turns {
                let asked = 30 + self.pause(400.0) as usize;
                let output = 20 + self.pause(220.0) as usize;
                text = self.grown(&text, asked.min(6000));
                text = self.ask(now, &text, output.min(1000));
                if text.tokens > 24_000 {
                    break;
                }
                // Reading and writing, after an answer of usual speed.
                now += 0.02 * output as f64 + 5.0 + self.pause(20.0);
            }
        }
    }

    fn mooncake(&mut self, seconds: f64, workers: usize) {
        // Prefixes by how often they are asked for; more workers serve more of them.
        let documents: Vec<Text> = (0..30 * workers)
            .map(|_| {
                let tokens = 1000 + self.pause(4500.0) as usize;
                self.grown(&Text::default(), tokens.min(20_000))
            })
            .collect();
        let mut at = 0.0;
        while at < seconds {
            at += self.pause(1.0 / (Self::PROMPTS * workers as f64));
            let prefix = if self.random.random_bool(0.65) {
                documents[self.rank(documents.len())].clone()
            } else {
                Text::default()
            };
            let own = 200 + self.pause(2600.0) as usize;
            let output = 10 + self.pause(180.0) as usize;
            let text = self.grown(&prefix, own.min(20_000));
            self.ask(at, &text, output.min(1000));
        }
    }

    /// Adds a request and returns the text with its answer.
    fn ask(&mut self, at: f64, prompt: &Text, output: usize) -> Text {
        let answered = self.grown(prompt, output);
        self.requests.push(Request {
            at,
            prompt: prompt.tokens,
            output,
            blocks: answered.blocks.as_slice().into(),
        });
        answered
    }

    fn grown(&mut self, text: &Text, tokens: usize) -> Text {
        let mut grown = text.clone();
        grown.tokens += tokens;
        while grown.blocks.len() < grown.tokens / BLOCK {
            self.next += 1;
            // Names are as random as hashes are.
            grown
                .blocks
                .push(BlockHash(self.next.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        }
        grown
    }

    /// Draws from an exponential distribution.
    fn pause(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.random.random::<f64>()).ln()
    }

    /// Draws one of `n`, the first far more often than the last (Zipf, about).
    fn rank(&mut self, n: usize) -> usize {
        let drawn = (n as f64 + 1.0).powf(self.random.random::<f64>());
        (drawn as usize - 1).min(n - 1)
    }
}
