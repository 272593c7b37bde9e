//! What is known of one request, and what is said about it.

use std::sync::Arc;

use crate::cache::{BlockHash, BlockId, BlockPool, block_hash};
use crate::model::{Chain, Logprobs};
use crate::request::Request;

/// Why an answer ended; the numbers are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Finish {
    Stop = 0,
    Length = 1,
    Abort = 2,
    Error = 3,
}

/// What happened to a request; the numbers are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    Queued = 1,
    Scheduled = 2,
    Preempted = 3,
}

/// What happened to a request, and when (seconds, monotonic).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    pub kind: EventKind,
    pub at: f64,
}

/// Where a prompt's tokens came from, as counted when it was first scheduled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillStats {
    pub prompt: usize,
    pub local_cached: usize,
    pub external_cached: usize,
    /// Tokens computed here that can be found from now on.
    pub created: usize,
}

/// KV that stays for another engine to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvHandle {
    pub blocks: Vec<BlockId>,
    /// Tokens of KV in them, and the state after those.
    pub tokens: usize,
    pub chain: Chain,
    /// Prompt tokens that this engine had cached.
    pub cached: usize,
}

/// Why an engine refuses a request, since 0.33.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: &'static str,
    pub message: &'static str,
    pub retryable: bool,
}

/// What one step brings one request.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub id: Arc<str>,
    pub client: usize,
    pub tokens: Vec<u32>,
    /// One per token, where asked for.
    pub logprobs: Option<Vec<Logprobs>>,
    /// One per prompt token after the first, with the first output.
    pub prompt_logprobs: Option<Vec<Logprobs>>,
    pub finish: Option<Finish>,
    /// The stop token, other than EOS, that ended it.
    pub stop_token: Option<u32>,
    pub events: Vec<Event>,
    pub kv: Option<KvHandle>,
    pub prefill: Option<PrefillStats>,
    pub refusal: Option<Refusal>,
}

impl Output {
    /// An end without tokens.
    #[must_use]
    pub fn ended(id: Arc<str>, client: usize, finish: Finish) -> Self {
        Self {
            id,
            client,
            tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: Some(finish),
            stop_token: None,
            events: Vec::new(),
            kv: None,
            prefill: None,
            refusal: None,
        }
    }
}

/// Load of an engine, and what its prefix cache did since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub kv_usage: f64,
    pub cache_requests: usize,
    pub cache_queries: usize,
    pub cache_hits: usize,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Waiting,
    Running,
    /// Its KV is on the way from another engine.
    Loading,
}

/// One request.
#[derive(Debug)]
pub(super) struct State {
    pub(super) request: Request,
    /// Prompt and output.
    pub(super) tokens: Vec<u32>,
    /// State after all tokens.
    pub(super) chain: Chain,
    /// Tokens whose KV is there, or will be once the planned step is carried out.
    pub(super) computed: usize,
    pub(super) blocks: Vec<BlockId>,
    /// How many of them are findable.
    pub(super) stored: usize,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) status: Status,
    /// Prompt tokens found in the cache when it was last scheduled.
    pub(super) cached: usize,
    pub(super) prefill: Option<PrefillStats>,
    pub(super) preemptions: usize,
    pub(super) answered: bool,
    events: Vec<Event>,
}

impl State {
    pub(super) fn new(request: Request, start: Chain) -> Self {
        Self {
            tokens: request.prompt.clone(),
            chain: start.extend_all(&request.prompt),
            request,
            computed: 0,
            blocks: Vec::new(),
            stored: 0,
            hashes: Vec::new(),
            status: Status::Waiting,
            cached: 0,
            prefill: None,
            preemptions: 0,
            answered: false,
            events: Vec::new(),
        }
    }

    pub(super) fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    pub(super) fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len()..]
    }

    pub(super) fn event(&mut self, kind: EventKind, at: f64) {
        self.events.push(Event { kind, at });
    }

    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The hash of a full block, counted from 0.
    pub(super) fn hash(&mut self, block: usize, block_size: usize) -> BlockHash {
        while self.hashes.len() <= block {
            let index = self.hashes.len();
            let tokens = &self.tokens[index * block_size..(index + 1) * block_size];
            let extra = self.extra_keys(index).unwrap_or_default();
            let hash = block_hash(self.hashes.last().copied(), tokens, &extra);
            self.hashes.push(hash);
        }
        self.hashes[block]
    }

    /// What keeps a block apart from others of the same tokens: the adapter, and for the first
    /// block the salt.
    fn extra_keys(&self, block: usize) -> Option<Vec<String>> {
        let lora = self.request.lora.iter().map(|(_, name)| name.clone());
        let salt = self.request.cache_salt.iter().filter(|_| block == 0);
        let keys: Vec<String> = lora.chain(salt.cloned()).collect();
        (!keys.is_empty()).then_some(keys)
    }

    /// Makes the blocks that are full by now findable.
    pub(super) fn store(&mut self, pool: &mut BlockPool, block_size: usize) {
        let full = self.computed.min(self.tokens.len()) / block_size;
        if full <= self.stored {
            return;
        }
        let from = self.stored;
        self.hash(full - 1, block_size);
        let extra_keys = (from..full).map(|block| self.extra_keys(block)).collect();
        pool.store(
            &self.blocks[from..full],
            &self.hashes[from..full],
            from.checked_sub(1).map(|parent| self.hashes[parent]),
            &self.tokens[from * block_size..full * block_size],
            self.request.lora.as_ref(),
            extra_keys,
        );
        self.stored = full;
    }

    /// The last word about a request that cannot be answered.
    pub(super) fn failed(mut self) -> Output {
        let events = self.take_events();
        Output {
            events,
            ..Output::ended(self.request.id, self.request.client, Finish::Error)
        }
    }
}
