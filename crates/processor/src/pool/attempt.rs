//! One try at one worker: booked, begun, streamed.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::StreamExt;
use stator_common::plane::DeltaStream;
use stator_common::proto::worker::{self, Delta, FinishReason, GenerateRequest, TokenLogprobs};
use stator_common::{Code, ids::WorkerId};
use stator_router::{Booking, Share};

use super::{DispatchError, Target, Worker};

/// What a client is told of an answer that the engine gave up.
pub(crate) const ABORTED: &str = "the engine aborted the request";

/// A request whose worker is chosen and whose load is booked there; not sent yet.
pub(crate) struct Booked {
    target: Arc<Target>,
    booking: Booking,
    share: Share,
    /// Tokens of the prompt that the target says that it holds.
    expected: u64,
}

impl Booked {
    pub(super) fn new(target: &Arc<Target>, share: Share, expected: u64) -> Self {
        target.worker.chosen();
        Self {
            target: Arc::clone(target),
            booking: target.ledger.book(share),
            share,
            expected,
        }
    }

    /// Returns what of the prompt the target is expected not to have, in tokens.
    pub(crate) fn uncached(&self) -> u64 {
        self.share.prompt.saturating_sub(self.share.cached)
    }

    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.target.worker
    }

    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Sends the request.
    ///
    /// # Errors
    /// It could not be sent.
    pub(crate) fn send(self, request: &GenerateRequest) -> Result<Attempt, DispatchError> {
        let Self {
            target,
            booking,
            expected,
            ..
        } = self;
        let client = target.worker.client();
        let sent = if target.dp_rank.is_some() && request.dp_rank.is_none() {
            client.generate(&GenerateRequest {
                dp_rank: target.dp_rank,
                ..request.clone()
            })
        } else {
            client.generate(request)
        };
        let stream = sent.map_err(|error| DispatchError {
            code: error.code(),
            message: error.to_string(),
            field: None,
            began: false,
        })?;
        Ok(Attempt {
            stream,
            target,
            booking: Some(booking),
            expected,
            first: None,
        })
    }

    /// Sends the request and waits for the first delta.
    ///
    /// # Errors
    /// The worker refused the request, or was lost before it answered.
    pub(crate) async fn begin(self, request: &GenerateRequest) -> Result<Attempt, DispatchError> {
        let mut attempt = self.send(request)?;
        let first = attempt.next().await;
        match first {
            Some(delta) if delta.finish == FinishReason::Error as i32 => Err(refusal(delta)),
            Some(delta) if delta.finish == FinishReason::Abort as i32 => {
                Err(DispatchError::new(Code::Unavailable, ABORTED))
            }
            Some(delta) => {
                attempt.target.answered();
                attempt.first = Some(delta);
                Ok(attempt)
            }
            None => Err(DispatchError::new(
                Code::Disconnected,
                "the worker ended the stream without an answer",
            )),
        }
    }
}

/// Returns why a worker ended a stream in an error.
fn refusal(delta: Delta) -> DispatchError {
    match delta.error {
        Some(error) => {
            let code = error.code().into();
            DispatchError {
                code,
                field: (!error.field.is_empty()).then(|| error.field.clone()),
                message: error.message,
                began: !error.untouched,
            }
        }
        None => DispatchError::new(Code::Internal, "the worker failed without a reason"),
    }
}

/// A request that a worker answers. Dropping it before the last delta cancels it in the engine.
pub struct Attempt {
    stream: DeltaStream,
    target: Arc<Target>,
    /// Absent after the last delta.
    booking: Option<Booking>,
    /// Tokens of the prompt that the target said that it holds; compared once.
    expected: u64,
    first: Option<Delta>,
}

impl Attempt {
    /// Returns what came since the last call, or `None` after the delta with a finish reason.
    ///
    /// Several engine steps come as one delta where the caller was slower than the engine. A worker that
    /// is lost ends the stream with [`FinishReason::Error`] and a reason. Cancel safe.
    pub async fn next(&mut self) -> Option<Delta> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Does what [`Attempt::next`] does, for callers that are polled themselves.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(first));
        }
        if self.booking.is_none() {
            return Poll::Ready(None);
        }
        let delta = ready!(self.stream.poll_next_unpin(cx));
        match &delta {
            Some(delta) => self.account(delta),
            None => self.booking = None,
        }
        Poll::Ready(delta)
    }

    /// Returns the worker that answers.
    pub fn worker(&self) -> &WorkerId {
        self.target.worker.id()
    }

    /// Puts what an earlier leg said about the prompt in place of what this worker knows of it.
    pub(crate) fn preface(&mut self, prompt_logprobs: Vec<TokenLogprobs>, cached: Option<u32>) {
        if let Some(first) = &mut self.first {
            first.prompt_logprobs = prompt_logprobs;
            first.cached_tokens = cached;
        }
    }

    fn account(&mut self, delta: &Delta) {
        if let (Some(found), Some(entry)) = (delta.cached_tokens, self.target.entry()) {
            entry.compare(std::mem::take(&mut self.expected), found.into());
        }
        if delta.finish == FinishReason::Unspecified as i32 {
            if let Some(booking) = &mut self.booking {
                booking.generated(delta.tokens.len());
            }
            return;
        }
        self.booking = None;
        if let Some(error) = &delta.error {
            self.target.failed(
                worker::Code::try_from(error.code)
                    .unwrap_or_default()
                    .into(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_the_code_and_field_of_the_worker() {
        let error = worker::Error {
            code: worker::Code::InvalidRequest.into(),
            message: "too many".to_owned(),
            field: "logprobs".to_owned(),
            ..Default::default()
        };
        let error = refusal(Delta {
            error: Some(error),
            ..Delta::default()
        });
        assert_eq!(error.code(), Code::InvalidRequest);
        assert_eq!(error.field.as_deref(), Some("logprobs"));
    }
}
