//! The hand-off of a prompt that waits until a prefill worker has room.
//!
//! As in [`handoff`](super::handoff), but nothing is chosen beforehand: the prefill worker is the one that has room first,
//! and the decode worker is chosen when the prompt goes there. Choices that follow another one do not wait: what
//! they need is in the cache of the worker that computed it.

use std::sync::Arc;

use parking_lot::Mutex;
use stator_common::WorkerId;
use stator_router::{Conditional, Situation, Verdict, Why};
use tracing::debug;

use super::handoff::{Broken, Tried, failed, no_pair, prefill_request};
use super::prefill::Computed;
use super::queue::Queue;
use super::{Fleet, Order};
use crate::pool::{Ask, Attempt, Booked, DispatchError};

impl Fleet {
    /// Runs through the chain once, through the queue.
    pub(super) async fn run_through(
        &self,
        queue: &Arc<Queue>,
        order: &Order,
        tried: &mut Tried,
        computed: Option<Computed>,
    ) -> Result<Attempt, Broken> {
        let verdict = order.siblings.verdict(|| self.foresee(queue, order));
        if verdict.is_local() {
            debug!(request = order.request.request_id, %verdict, "hand-off decided");
            return Ok(self.locally(order, tried).await?);
        }
        let (computed, decode) = match computed {
            Some(computed) if computed.held.is_fresh() => {
                let decode = self.decode_with(order, tried, &computed.by);
                (computed, decode.ok_or_else(|| no_pair(order))?)
            }
            over => {
                if let Some(over) = over {
                    self.expired(order, &over);
                }
                self.compute_when_free(queue, order, tried).await?
            }
        };
        let computed = self.still_held(order, computed)?;
        self.continue_at(order, tried, decode, computed).await
    }

    /// Lets the first prefill worker with room compute the prompt, after the first of its choices, and chooses who
    /// goes on.
    async fn compute_when_free(
        &self,
        queue: &Arc<Queue>,
        order: &Order,
        tried: &mut Tried,
    ) -> Result<(Computed, Booked), DispatchError> {
        let place = *tried.place.get_or_insert_with(|| queue.place());
        let tried = Mutex::new(tried);
        let compute = |cached_at: Option<WorkerId>| {
            let tried = &tried;
            async move {
                let follows = cached_at.and_then(|at| {
                    self.prefill.choose(&Ask {
                        pinned: Some(&at),
                        tried: &tried.lock().prefill,
                        cached: true,
                        ..order.ask_prefill(&order.prompt())
                    })
                });
                let (_turn, prefill) = match follows {
                    Some(prefill) => (queue.turn(), prefill),
                    None => {
                        let failures = tried.lock().prefill.clone();
                        queue.wait(order, place, failures).await?
                    }
                };
                let decode = self.decode_with(order, &mut tried.lock(), prefill.worker());
                let decode = decode.ok_or_else(|| no_pair(order))?;
                let target = prefill.target().clone();
                let request = prefill_request(order);
                match self.prefill(order, prefill, &request).await {
                    Ok(computed) => Ok((computed, decode)),
                    Err(error) => {
                        failed(&target, &error, &mut tried.lock().prefill);
                        Err(error)
                    }
                }
            }
        };
        let by = |(computed, _): &(Computed, Booked)| computed.by.id().clone();
        order.siblings.compute(compute, by).await
    }

    /// Decides who computes a prompt that would have to wait.
    fn foresee(&self, queue: &Queue, order: &Order) -> Verdict {
        if self.rules.conditional == Conditional::Off {
            return Verdict::Remote(Why::Off);
        }
        let considered = self.decode.consider(&Ask {
            prefilled: true,
            ..order.ask(&order.request)
        });
        let Some(decode) = considered.iter().find(|one| one.chosen.is_some()) else {
            return Verdict::Remote(Why::Unmeasured);
        };
        let load = decode.target.load();
        let ahead = queue.ahead();
        let situation = Situation {
            uncached: decode
                .terms
                .prompt
                .saturating_sub(decode.terms.cached.device),
            uncached_at_prefill: self.prefill.least_work(&order.ask_prefill(&order.prompt())),
            prefill_queue: ahead.tokens,
            decode_queue: load.prefill_tokens,
            streams: load.generating,
            queued: ahead.prompts,
        };
        self.rules
            .conditional
            .decide(&situation, &self.measured.lock())
    }
}
