//! From what a client sent to the tokens of a prompt.

use std::sync::Arc;

use bytes::Bytes;
use stator_common::Code;
use stator_text::Tokenizer;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::error::ApiError;
use super::request::{Int, Shared, Side};
use super::sampling::Limits;

/// Bytes of text from which work on it leaves the async threads: tokenizing 16 KiB takes about 2 ms.
pub(crate) const LONG: usize = 16 << 10;

/// Bytes of long prompts and bodies that are worked on or wait for it, at most: a bound on memory, far above the
/// burst of a benchmark (a thousand prompts of a hundred thousand tokens are half of it).
const MAX_WAITING: usize = 1 << 30;

/// Bytes that one permit of [`LongWork`] stands for.
const UNIT: usize = 1 << 10;

/// Bytes that the longest token of any vocabulary surely has; more text than this per token of context is
/// refused before it is tokenized.
const MOST_BYTES_PER_TOKEN: usize = 1024;

/// One prompt as the engine sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prompt {
    /// Never empty, shorter than the context.
    pub(crate) tokens: Vec<u32>,
    /// The text behind them, where the request had text.
    pub(crate) text: Option<String>,
}

impl Prompt {
    /// Returns the tokens as they travel: little-endian words.
    pub(crate) fn to_bytes(&self) -> Bytes {
        // In this form a copy of the memory; a buffer's `put_u32_le` asks for room at every token.
        let mut bytes = vec![0; 4 * self.tokens.len()];
        for (word, token) in bytes.chunks_exact_mut(4).zip(&self.tokens) {
            word.copy_from_slice(&token.to_le_bytes());
        }
        bytes.into()
    }
}

/// Where a prompt comes from and how much of it is used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// The field that errors name.
    pub(crate) field: &'static str,
    pub(crate) add_special_tokens: bool,
    /// Tokens to keep, and of which end.
    truncate: Option<(usize, Side)>,
    /// Tokens that the context has; absent: any number will do.
    max_model_len: Option<u32>,
    vocab_size: u32,
}

impl Rules {
    /// Returns the rules for a prompt that is only looked at.
    pub(crate) fn unlimited(field: &'static str, add_special_tokens: bool) -> Self {
        Self {
            field,
            add_special_tokens,
            truncate: None,
            max_model_len: None,
            vocab_size: u32::MAX,
        }
    }

    /// Returns the rules of a request.
    ///
    /// # Errors
    /// `truncate_prompt_tokens` out of range.
    pub(crate) fn new(
        shared: &Shared,
        field: &'static str,
        add_special_tokens: bool,
        limits: &Limits<'_>,
    ) -> Result<Self, ApiError> {
        let name = "truncate_prompt_tokens";
        let most = limits.max_model_len as usize;
        let keep = match shared.truncate_prompt_tokens {
            None => None,
            // One token of the context is left for the answer.
            Some(Int(-1)) => Some(most - 1),
            Some(Int(keep)) => match usize::try_from(keep) {
                Ok(keep) if keep <= most => Some(keep),
                _ => {
                    let message = format!("{name} must be -1 or between 0 and {most}, got {keep}");
                    return Err(ApiError::invalid(name, message));
                }
            },
        };
        // Generation continues at a prompt's end, so its beginning goes (vLLM 0.32, tokenizers/registry.py).
        let side = shared.truncation_side.unwrap_or(Side::Left);
        Ok(Self {
            field,
            add_special_tokens: shared.add_special_tokens.unwrap_or(add_special_tokens),
            truncate: keep.map(|keep| (keep, side)),
            max_model_len: Some(limits.max_model_len),
            vocab_size: limits.vocab_size,
        })
    }

    /// Tokenizes text. Takes about a tenth of a millisecond per KiB: see [`LONG`].
    ///
    /// # Errors
    /// The text has no tokens, or too many.
    pub(crate) fn tokenize(&self, tokenizer: &Tokenizer, text: String) -> Result<Prompt, ApiError> {
        if let (None, Some(context)) = (self.truncate, self.max_model_len)
            && text.len() > (context as usize).saturating_mul(MOST_BYTES_PER_TOKEN)
        {
            let message = format!(
                "the model's context is {context} tokens, the prompt of {} bytes cannot fit",
                text.len()
            );
            return Err(ApiError::invalid(self.field, message));
        }
        let tokens = tokenizer
            .encode(&text, self.add_special_tokens)
            .map_err(|error| ApiError::invalid(self.field, error.to_string()))?;
        let tokens = self.check(tokens)?;
        Ok(Prompt {
            tokens,
            text: Some(text),
        })
    }

    /// Takes tokens as the client sent them.
    ///
    /// # Errors
    /// There are none, or too many, or one is not in the vocabulary.
    pub(crate) fn tokens(&self, tokens: &[Int]) -> Result<Prompt, ApiError> {
        let token = |&Int(id): &Int| {
            u32::try_from(id)
                .ok()
                .filter(|&id| id < self.vocab_size)
                .ok_or_else(|| {
                    let message =
                        format!("token id {id} is out of vocabulary ({})", self.vocab_size);
                    ApiError::invalid(self.field, message)
                })
        };
        let tokens = tokens.iter().map(token).collect::<Result<_, _>>()?;
        Ok(Prompt {
            tokens: self.check(tokens)?,
            text: None,
        })
    }

    fn check(&self, mut tokens: Vec<u32>) -> Result<Vec<u32>, ApiError> {
        match self.truncate {
            Some((keep, Side::Right)) => tokens.truncate(keep),
            Some((keep, Side::Left)) => drop(tokens.drain(..tokens.len().saturating_sub(keep))),
            None => {}
        }
        let Some(context) = self.max_model_len else {
            return Ok(tokens);
        };
        if tokens.is_empty() {
            return Err(ApiError::invalid(self.field, "the prompt is empty"));
        }
        if tokens.len() >= context as usize {
            let message = format!(
                "the model's context is {context} tokens, the prompt has {}, which leaves none for an answer",
                tokens.len()
            );
            return Err(ApiError::invalid(self.field, message));
        }
        Ok(tokens)
    }
}

/// The work on long prompts and bodies, which has threads of its own.
#[derive(Clone, Debug)]
pub(crate) struct LongWork {
    /// A permit per [`UNIT`].
    room: Arc<Semaphore>,
    /// Permits when nothing runs.
    units: usize,
}

impl Default for LongWork {
    fn default() -> Self {
        Self::new(MAX_WAITING)
    }
}

impl LongWork {
    /// Returns the work with room for `bytes` of what runs or waits.
    fn new(bytes: usize) -> Self {
        let units = bytes / UNIT;
        let room = Arc::new(Semaphore::new(units));
        Self { room, units }
    }

    /// Does work on `bytes` of text: at once, or on a thread for such work when it would take long.
    ///
    /// Work that waits for a thread when the future is dropped is not begun.
    ///
    /// # Errors
    /// Those of the work, or too much of it waits already.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= LONG {
            return work();
        }
        // A text larger than all the room takes all of it.
        let units = u32::try_from(bytes.div_ceil(UNIT).min(self.units)).unwrap_or(u32::MAX);
        let Ok(place) = Arc::clone(&self.room).try_acquire_many_owned(units) else {
            let message = "too many long requests wait to be read";
            return Err(ApiError::new(Code::Overloaded, message));
        };
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(place);
            done
        });
        let lost = |error| ApiError::new(Code::Internal, format!("prepare the prompt: {error}"));
        AbortOnDropHandle::new(done).await.map_err(lost)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::GenerationConfig;

    fn rules(shared: &Shared) -> Result<Rules, ApiError> {
        let generation = GenerationConfig::default();
        let limits = Limits {
            max_model_len: 8,
            vocab_size: 100,
            max_logprobs: 20,
            eos_token_id: None,
            generation: &generation,
        };
        Rules::new(shared, "prompt", true, &limits)
    }

    fn ids(count: i64) -> Vec<Int> {
        (0..count).map(Int).collect()
    }

    #[test]
    fn a_prompt_must_leave_room_for_one_token() {
        let rules = rules(&Shared::default()).unwrap();
        assert_eq!(rules.tokens(&ids(7)).unwrap().tokens.len(), 7);
        for tokens in [
            ids(0),
            ids(8),
            ids(9),
            vec![Int(-1)],
            vec![Int(100)],
            vec![Int(i64::MAX)],
        ] {
            assert_eq!(
                rules.tokens(&tokens).unwrap_err().param(),
                Some("prompt"),
                "{tokens:?}"
            );
        }
    }

    #[test]
    fn a_prompt_is_cut_from_the_side_asked_for() {
        let keep = |keep, side| Shared {
            truncate_prompt_tokens: Some(Int(keep)),
            truncation_side: side,
            ..Shared::default()
        };
        let cut = |shared: &Shared| rules(shared).unwrap().tokens(&ids(20)).unwrap().tokens;
        assert_eq!(cut(&keep(3, None)), [17, 18, 19]);
        assert_eq!(cut(&keep(3, Some(Side::Left))), [17, 18, 19]);
        assert_eq!(cut(&keep(3, Some(Side::Right))), [0, 1, 2]);
        assert_eq!(cut(&keep(-1, None)).len(), 7);
        assert!(rules(&keep(9, None)).is_err());
        assert!(rules(&keep(-2, None)).is_err());
    }

    #[test]
    fn tokens_travel_as_little_endian_words() {
        let prompt = Prompt {
            tokens: vec![1, 256],
            text: None,
        };
        assert_eq!(prompt.to_bytes(), [1, 0, 0, 0, 0, 1, 0, 0].as_slice());
    }

    #[tokio::test]
    async fn long_work_beyond_its_room_is_refused_and_frees_its_room() {
        let work = LongWork::new(LONG + UNIT);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let first = work.clone();
        let first =
            tokio::spawn(async move { first.run(LONG + 1, move || Ok(wait.recv().is_ok())).await });
        while work.room.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = work.run(LONG + 1, || Ok(())).await.unwrap_err();
        assert_eq!(refused.code(), Code::Overloaded);
        assert!(
            work.run(LONG, || Ok(())).await.is_ok(),
            "short work has no queue"
        );
        go.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        assert!(work.run(LONG + 1, || Ok(())).await.is_ok());
        assert!(
            work.run(10 * LONG, || Ok(())).await.is_ok(),
            "a text larger than the room has it for itself"
        );
    }

    #[test]
    fn long_work_that_nobody_waits_for_is_not_begun() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let work = LongWork::new(4 * LONG);
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let mut first = Box::pin(work.run(LONG + 1, move || Ok(wait.recv().is_ok())));
            assert!(futures::poll!(&mut first).is_pending());
            let (begun, was_begun) = std::sync::mpsc::channel();
            let mut second = Box::pin(work.run(LONG + 1, move || Ok(begun.send(()))));
            assert!(futures::poll!(&mut second).is_pending());
            drop(second);
            go.send(()).unwrap();
            assert!(first.await.unwrap());
            assert!(was_begun.recv().is_err());
        });
    }
}
