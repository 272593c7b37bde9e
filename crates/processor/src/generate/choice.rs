//! The choices of one request, each an attempt at a worker and the text made of its tokens.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use serde_json::Value;
use stator_common::Code;
use stator_common::proto::worker::{Delta, FinishReason, TokenLogprobs};
use stator_text::{End, OutputText, TokenizerError};

use crate::fleet::{Fleet, Order};
use crate::openai::ApiError;
use crate::pool::{ABORTED, Attempt, DispatchError};

/// What a delta adds to a choice. Its text goes where the caller says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// The new tokens, without those after a stop string.
    pub(crate) tokens: Vec<u32>,
    /// One per token, where asked for.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// One per prompt token after the first, where asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    /// On the first piece, where the engine says so: prompt tokens that came from a cache.
    pub(crate) cached: Option<u32>,
    /// On the last piece.
    pub(crate) finish: Option<Finish>,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: Reason,
    /// What stopped it, unless that was the end-of-sequence token.
    pub(crate) stop: Option<Stop>,
}

/// The kinds of ends that a client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Stop,
    Length,
    Repetition,
}

impl Reason {
    /// Returns the name that answers carry.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Repetition => "repetition",
        }
    }
}

/// What the request asked to stop at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Token(u32),
    Text(String),
}

/// One choice of a request.
pub(crate) struct Choice {
    source: Source,
    text: OutputText,
    /// The field that asked for a form of answer, until the first token shows that the engine can hold to it.
    constraint: Option<&'static str>,
}

enum Source {
    /// Nothing has been done for it.
    New(Arc<Fleet>, Order),
    /// Waits for a worker's first delta.
    Starting(Pin<Box<dyn Future<Output = Result<Attempt, DispatchError>> + Send>>),
    Running(Box<Attempt>),
    Finished,
}

impl Choice {
    /// Begins a choice; nothing is sent before it is polled.
    ///
    /// - `constraint`: the field that asks for a form of answer, where one does.
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        order: Order,
        text: OutputText,
        constraint: Option<&'static str>,
    ) -> Self {
        Self {
            source: Source::New(fleet, order),
            text,
            constraint,
        }
    }

    fn is_finished(&self) -> bool {
        matches!(self.source, Source::Finished)
    }

    /// Says where the choice would go, unless it went.
    pub(crate) fn explain(&self) -> Option<Value> {
        match &self.source {
            Source::New(fleet, order) => Some(fleet.explain(order)),
            Source::Starting(_) | Source::Running(_) | Source::Finished => None,
        }
    }

    fn poll_delta(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delta, ApiError>> {
        if let Source::New(..) = self.source
            && let Source::New(fleet, order) = std::mem::replace(&mut self.source, Source::Finished)
        {
            let attempt = async move { fleet.dispatch(&order).await };
            self.source = Source::Starting(Box::pin(attempt));
        }
        if let Source::Starting(attempt) = &mut self.source {
            match ready!(attempt.as_mut().poll(cx)) {
                Ok(attempt) => self.source = Source::Running(Box::new(attempt)),
                Err(error) => return Poll::Ready(Err(self.blame(error.into()))),
            }
        }
        let Source::Running(attempt) = &mut self.source else {
            return Poll::Pending;
        };
        let lost = || ApiError::new(Code::Disconnected, "the worker ended the stream too early");
        Poll::Ready(ready!(attempt.poll_next(cx)).ok_or_else(lost))
    }

    /// Names the request's own field where the worker blames what it knows under another name.
    fn blame(&self, error: ApiError) -> ApiError {
        match (error.param(), self.constraint) {
            (Some("structured_outputs"), Some(field)) => error.with_param(field),
            (Some("extra_args"), _) => error.with_param("vllm_xargs"),
            _ => error,
        }
    }

    /// Turns a delta into a piece and appends its text to `out`.
    fn take(&mut self, delta: Delta, out: &mut String) -> Result<Piece, ApiError> {
        let finish = FinishReason::try_from(delta.finish).unwrap_or_default();
        let mut reason = match finish {
            FinishReason::Unspecified => None,
            FinishReason::Stop => Some(Reason::Stop),
            FinishReason::Length => Some(Reason::Length),
            // No end that a client could be told: its answer is not all there.
            FinishReason::Abort => return Err(ApiError::new(Code::Unavailable, ABORTED)),
            FinishReason::Repetition => Some(Reason::Repetition),
            FinishReason::Error => {
                let unknown =
                    || ApiError::new(Code::Internal, "the engine failed without a reason");
                return Err(self.blame(delta.error.map_or_else(unknown, ApiError::from)));
            }
        };
        self.constraint = None;
        let mut piece = Piece {
            tokens: delta.tokens,
            logprobs: delta.logprobs,
            prompt_logprobs: delta.prompt_logprobs,
            cached: delta.cached_tokens,
            finish: None,
        };
        let end = match reason {
            None => End::Not,
            Some(Reason::Stop) => End::StopToken,
            Some(Reason::Length | Reason::Repetition) => End::Other,
        };
        let mut stop = delta.stop_token_id.map(Stop::Token);
        let pushed = self.text.push(&piece.tokens, end, out)?;
        if let Some(index) = pushed.stop {
            piece.tokens.truncate(pushed.kept_tokens);
            piece.logprobs.truncate(pushed.kept_tokens);
            reason = Some(Reason::Stop);
            stop = self
                .text
                .stop_strings()
                .get(index)
                .map(|text| Stop::Text(text.to_owned()));
        }
        piece.finish = reason.map(|reason| Finish { reason, stop });
        if piece.finish.is_some() {
            // The engine may not know yet that a stop string ended this choice: dropping the attempt
            // tells it.
            self.source = Source::Finished;
        }
        Ok(piece)
    }
}

/// All choices of a request.
pub(crate) struct Generation {
    choices: Vec<Choice>,
    /// Choices that have not finished.
    running: usize,
    /// The choice to be polled next, so that one with much output does not starve the others.
    next: usize,
}

impl Generation {
    pub(crate) fn new(choices: Vec<Choice>) -> Self {
        Self {
            running: choices.len(),
            choices,
            next: 0,
        }
    }

    /// Returns the number of choices, finished ones included.
    pub(crate) fn len(&self) -> usize {
        self.choices.len()
    }

    /// Returns the next piece of any choice, with the choice's index; its text replaces what is in `text`.
    /// `None` when all have finished.
    ///
    /// # Errors
    /// A choice failed. The others must not be polled on: a request succeeds as a whole.
    pub(crate) fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
        text: &mut String,
    ) -> Poll<Option<Result<(usize, Piece), ApiError>>> {
        if self.running == 0 {
            return Poll::Ready(None);
        }
        for _ in 0..self.choices.len() {
            let index = self.next;
            self.next = (index + 1) % self.choices.len();
            let choice = &mut self.choices[index];
            if choice.is_finished() {
                continue;
            }
            let Poll::Ready(delta) = choice.poll_delta(cx) else {
                continue;
            };
            text.clear();
            let piece = delta.and_then(|delta| choice.take(delta, text));
            self.running -= usize::from(choice.is_finished());
            return Poll::Ready(Some(piece.map(|piece| (index, piece))));
        }
        Poll::Pending
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        ApiError::new(error.code(), error.to_string())
    }
}

impl From<DispatchError> for ApiError {
    fn from(error: DispatchError) -> Self {
        let failed = ApiError::new(error.code, error.message);
        match error.field {
            Some(field) => failed.with_param(field),
            None => failed,
        }
    }
}
