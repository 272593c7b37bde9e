//! What the engine says: the outputs of one step, as far as anybody here reads them.

use bytes::Bytes;
use smallvec::SmallVec;

/// Names a live request of one engine. The last eight hex digits of the engine's request id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(pub u32);

impl RequestKey {
    /// Returns the id under which the engine knows the request, `<external>-<8 hex digits>`.
    ///
    /// vLLM's own front end forms ids the same way, and its NIXL connector strips the suffix to
    /// match a prefill with its decode.
    pub fn engine_id(self, external: &str) -> String {
        format!("{external}-{:08x}", self.0)
    }

    /// Reads the key back from an engine id; `None` for an id that [`Self::engine_id`] cannot have made.
    pub fn of_engine_id(id: &[u8]) -> Option<Self> {
        let (_, suffix) = id.split_last_chunk::<9>()?;
        let [b'-', digits @ ..] = suffix else {
            return None;
        };
        let mut key = 0u32;
        for digit in digits {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            key = key << 4 | u32::from(value);
        }
        Some(Self(key))
    }
}

/// One message from the engine.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "moved once per step; a box would be an allocation per step"
)]
pub enum Message {
    Batch(Batch),
    /// `ENGINE_CORE_DEAD`: the engine is gone and nothing follows.
    Dead,
}

/// The outputs of one engine step.
#[derive(Debug, Default)]
pub struct Batch {
    /// DP rank of the engine that sent this.
    pub engine_index: u32,
    pub outputs: Vec<Output>,
    /// Engine ids of unfinished requests that nobody here waits for: to be aborted.
    pub orphans: Vec<Bytes>,
    pub stats: Option<SchedulerStats>,
    pub utility: Option<UtilityOutput>,
}

/// What one step added to one request.
#[derive(Debug)]
pub struct Output {
    pub key: RequestKey,
    pub tokens: SmallVec<[u32; 4]>,
    /// One row per token of `tokens`, if asked for.
    pub logprobs: Option<Box<Logprobs>>,
    /// Rows for prompt tokens 1.. (the first has none), if asked for. Engines may send them in
    /// pieces, in order: the consumer appends.
    pub prompt_logprobs: Option<Box<Logprobs>>,
    pub finish: Option<Finish>,
    /// The token that stopped it, for [`Finish::Stop`] by a stop token other than EOS.
    pub stop_token: Option<u32>,
    /// Prompt tokens that came from a cache; on the first output.
    pub cached_tokens: Option<u32>,
    /// Hand-off parameters for the next leg, one msgpack value.
    pub kv_transfer_params: Option<Bytes>,
    pub error: Option<Box<RequestError>>,
}

/// Log-probabilities of `rows()` positions, row by row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Logprobs {
    /// Entries per row, at least 1: the chosen token in front, then the most likely ones.
    pub width: usize,
    /// `[rows * width]`
    pub tokens: Vec<u32>,
    /// `[rows * width]`
    pub values: Vec<f32>,
    /// `[rows]`: rank of the chosen token, 1 is the most likely.
    pub ranks: Vec<u32>,
}

impl Logprobs {
    pub fn rows(&self) -> usize {
        self.ranks.len()
    }

    /// Returns token ids, log-probabilities and the rank of the chosen token of every row.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u32], &[f32], u32)> {
        (0..self.rows()).map(|row| {
            let range = row * self.width..(row + 1) * self.width;
            (
                &self.tokens[range.clone()],
                &self.values[range],
                self.ranks[row],
            )
        })
    }
}

/// Why a request ended (vLLM's `FinishReason`, 0 to 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
    Abort,
    Error,
    Repetition,
}

/// Why the engine failed one request (0.33 and later say so; before, only [`Finish::Error`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    pub code: String,
    pub message: String,
    pub retryable: bool,
}

impl RequestError {
    /// The code of a constraint that cannot be compiled.
    pub const GRAMMAR: &str = "grammar";

    /// The engine could not compile the request's constraint; its log says so.
    pub(crate) fn grammar() -> Self {
        Self {
            code: Self::GRAMMAR.to_owned(),
            message: "the engine cannot compile this constraint".to_owned(),
            retryable: false,
        }
    }
}

/// The scheduler after one step; the fields that somebody reads.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SchedulerStats {
    pub running: u32,
    /// Waiting requests, those put off by a constraint included.
    pub waiting: u32,
    /// Share of KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// Prompt tokens looked up in the prefix cache since the last step, and found there.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    /// Preempted requests looked up again since the last step.
    pub preempted: u64,
    /// Prompts whose KV was moved here from another engine since the last step, the bytes of it, and the
    /// seconds that they took, added up.
    pub transfers: u64,
    pub transferred_bytes: u64,
    pub transfer_seconds: f64,
}

/// The answer to one utility call.
#[derive(Debug, Clone, PartialEq)]
pub struct UtilityOutput {
    pub call_id: i64,
    /// The result, or the engine's failure message.
    pub result: Result<serde_json::Value, String>,
}
