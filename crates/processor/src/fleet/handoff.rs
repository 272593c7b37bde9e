//! The hand-off: one request through a prefill worker and a decode worker.
//!
//! Both are chosen, and booked, before anything is sent, so that each choice can weigh the other. From there:
//!
//! ```text
//!   choose ──▶ prefill ──▶ held ──▶ decode ──▶ first token: the decode worker's stream from here on
//!     ▲           │          │         │
//!     └───────────┴──────────┴─────────┘  failed, or the lease is over: again, elsewhere, a few times
//! ```
//!
//! Prefill comes first also where engines know a hand-off by an id that the processor gives, and could begin
//! together: a decode engine that waits for one that never comes loses its blocks for good (NixlPushConnector, 0.32).
//!
//! Parameters that a decode engine may have seen are never used again: its fetch may be under way, and what it
//! did not fetch in time may be another prompt's by now. The prompt is computed again, mostly from the cache.

use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;
use stator_common::Code;
use stator_common::proto::worker::{Delta, GenerateRequest, Leg};
use stator_router::backlog::Place;
use stator_router::{Situation, Verdict};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::held::Held;
use super::prefill::Computed;
use super::{Fleet, Order};
use crate::pool::{Ask, Attempt, Booked, DispatchError, Failed, Target, Worker};

/// Times that the chain is begun, at most. As for single workers: more failures in a row are not the workers' fault.
const MAX_ATTEMPTS: usize = 4;

/// How long after the lease a decode engine may take to begin an answer whose KV is pushed to it: all of that KV
/// was on its way by then.
const PUSHED_WITHIN: Duration = Duration::from_secs(10);

/// Workers that failed a request.
pub(super) type Failures = SmallVec<[Failed; MAX_ATTEMPTS]>;

/// Workers that failed this request, by leg.
#[derive(Default)]
pub(super) struct Tried {
    pub(super) prefill: Failures,
    pub(super) decode: Failures,
    /// Where it waits for prefill workers, once it did.
    pub(super) place: Option<Place>,
}

/// Why one run through the chain failed.
pub(super) struct Broken {
    error: DispatchError,
    /// What is still good for another decode worker.
    computed: Option<Computed>,
}

impl From<DispatchError> for Broken {
    fn from(error: DispatchError) -> Self {
        Self {
            error,
            computed: None,
        }
    }
}

impl Fleet {
    /// Computes the prompt at a prefill worker and begins the answer at a decode worker, again and elsewhere if need
    /// be.
    pub(super) async fn hand_off(&self, order: &Order) -> Result<Attempt, DispatchError> {
        let mut tried = Tried::default();
        let follows = order.siblings.follows();
        let mut computed = None;
        let mut last: Option<DispatchError> = None;
        for attempt in 1.. {
            let run = match &self.queue {
                Some(queue) if queue.could_serve(order) => {
                    let computed = computed.take();
                    Some(self.run_through(queue, order, &mut tried, computed).await)
                }
                Some(_) => None,
                None => match self.choose(order, &mut tried, follows) {
                    Some(chosen) => {
                        let computed = computed.take();
                        Some(self.run(order, &mut tried, chosen, computed).await)
                    }
                    None => None,
                },
            };
            let broken = match run {
                Some(Ok(attempt)) => return Ok(attempt),
                Some(Err(broken)) => broken,
                // The failure of a worker that was there says more than the absence of others.
                None => return Err(last.unwrap_or_else(|| no_pair(order))),
            };
            if !broken.error.code.is_retryable() || attempt == MAX_ATTEMPTS {
                return Err(broken.error);
            }
            debug!(request = order.request.request_id, error = %broken.error, "hand-off failed before its first token");
            self.decode.retried();
            computed = broken.computed;
            last = Some(broken.error);
        }
        unreachable!("the loop ends at the last attempt")
    }

    /// Runs through the chain once.
    async fn run(
        &self,
        order: &Order,
        tried: &mut Tried,
        (decode, prefill): (Booked, Booked),
        computed: Option<Computed>,
    ) -> Result<Attempt, Broken> {
        // All choices go the same way: it is one prompt.
        let verdict = order.siblings.verdict(|| self.judge(&decode, &prefill));
        if verdict.is_local() {
            debug!(request = order.request.request_id, %verdict, "hand-off decided");
            // What was booked for a hand-off goes before the same decode workers are asked again.
            drop((decode, prefill));
            return Ok(self.locally(order, tried).await?);
        }
        let computed = match computed {
            Some(computed) if computed.held.is_fresh() => computed,
            over => {
                if let Some(over) = over {
                    self.expired(order, &over);
                }
                self.compute(order, tried, prefill, &decode).await?
            }
        };
        let computed = self.still_held(order, computed)?;
        self.continue_at(order, tried, decode, computed).await
    }

    /// Returns what a decode worker may be sent to fetch.
    pub(super) fn still_held(
        &self,
        order: &Order,
        computed: Computed,
    ) -> Result<Computed, DispatchError> {
        if computed.held.is_fresh() {
            return Ok(computed);
        }
        self.expired(order, &computed);
        let message = "the prefill engine's lease was over before anybody could fetch";
        Err(DispatchError::new(Code::HandoffFailed, message))
    }

    pub(super) fn expired(&self, order: &Order, computed: &Computed) {
        self.metrics.handoff.expired.increment(1);
        warn!(request = order.request.request_id, worker = %computed.by.id(), "the lease was over before the decode leg");
    }

    /// Chooses a decode worker that can go on from a prefill worker.
    pub(super) fn decode_with(
        &self,
        order: &Order,
        tried: &mut Tried,
        prefill: &Worker,
    ) -> Option<Booked> {
        let found = |tried: &[Failed]| {
            self.decode.choose(&Ask {
                prefilled: true,
                partner: Some(prefill),
                tried,
                ..order.ask(&order.request)
            })
        };
        // Where each has failed this request it was the hand-off that failed, or else it will again.
        found(&tried.decode).or_else(|| {
            tried.decode.clear();
            found(&[])
        })
    }

    /// Chooses a decode worker and a prefill worker that can work together.
    ///
    /// - `follows`: another choice of the prompt has begun, and this one will find it in the cache.
    fn choose(&self, order: &Order, tried: &mut Tried, follows: bool) -> Option<(Booked, Booked)> {
        let request = &*order.request;
        let prompt = order.prompt();
        let mut alone: Failures = tried.decode.clone();
        loop {
            let ask = Ask {
                prefilled: true,
                tried: &alone,
                ..order.ask(request)
            };
            let decode = match self.decode.choose(&ask) {
                Some(decode) => decode,
                // Each of those that are left has failed this request: one more time, if it was
                // the hand-off that failed and not the worker.
                None if !tried.decode.is_empty() && alone.len() == tried.decode.len() => {
                    tried.decode.clear();
                    alone.clear();
                    continue;
                }
                None => return None,
            };
            let partner = Some(&**decode.worker());
            let found = |tried: &[Failed]| {
                let ask = Ask {
                    partner,
                    tried,
                    cached: follows,
                    ..order.ask_prefill(&prompt)
                };
                self.prefill.choose(&ask)
            };
            match found(&tried.prefill).or_else(|| found(&[])) {
                Some(prefill) => return Some((decode, prefill)),
                None => alone.push(Failed::worker(decode.worker().id().clone())),
            }
        }
    }

    /// Decides who computes the prompt.
    fn judge(&self, decode: &Booked, prefill: &Booked) -> Verdict {
        let (ahead, at_decode) = (prefill.target().load(), decode.target().load());
        let situation = Situation {
            uncached: decode.uncached(),
            uncached_at_prefill: prefill.uncached(),
            // This request itself is booked already.
            prefill_queue: ahead.prefill_tokens.saturating_sub(prefill.uncached()),
            decode_queue: at_decode.prefill_tokens,
            streams: at_decode.generating,
            queued: ahead
                .prompts
                .saturating_sub(u64::from(prefill.uncached() > 0)),
        };
        let conditional = &self.rules.conditional;
        conditional.decide(&situation, &self.measured.lock())
    }

    /// Lets a decode worker do all of it.
    pub(super) async fn locally(
        &self,
        order: &Order,
        tried: &mut Tried,
    ) -> Result<Attempt, DispatchError> {
        self.metrics.handoff.local.increment(1);
        let request = GenerateRequest {
            deadline_ms: order.time_left(),
            leg: Leg::Local.into(),
            ..GenerateRequest::clone(&order.request)
        };
        let nobody = || DispatchError::new(Code::Unavailable, "no decode worker is connected");
        let booked = self.decode.choose(&Ask {
            tried: &tried.decode,
            ..order.ask(&request)
        });
        let booked = booked.ok_or_else(nobody)?;
        let (target, work) = (
            booked.target().clone(),
            booked.target().ledger.load().prefill_tokens,
        );
        let since = Instant::now();
        match booked.begin(&request).await {
            Ok(attempt) => {
                let seconds = since.elapsed().as_secs_f64();
                self.measured.lock().local.add(work as f64, seconds);
                Ok(attempt)
            }
            Err(error) => {
                failed(&target, &error, &mut tried.decode);
                Err(error)
            }
        }
    }

    /// Runs the decode leg up to its first token.
    pub(super) async fn continue_at(
        &self,
        order: &Order,
        tried: &mut Tried,
        decode: Booked,
        computed: Computed,
    ) -> Result<Attempt, Broken> {
        let target = decode.target().clone();
        let fetched = decode.uncached();
        let Computed {
            held,
            by,
            transfer_id,
            delta,
        } = computed;
        let (params, until, releaser) = held.take();
        let request = decode_request(order, params.clone(), until, transfer_id.clone());
        let since = Instant::now();
        let begun = decode.begin(&request);
        let begun = if transfer_id.is_empty() {
            begun.await
        } else {
            // An engine that is pushed to waits for ever where nothing comes (NixlPushConnector, 0.32).
            let late = |_| {
                let message = "nothing was pushed to the decode engine while the KV was kept";
                Err(DispatchError::new(Code::HandoffFailed, message))
            };
            timeout_at(until + PUSHED_WITHIN, begun)
                .await
                .unwrap_or_else(late)
        };
        match begun {
            Ok(attempt) => Ok(self.begun(attempt, delta, fetched, since)),
            Err(error) => {
                self.metrics.handoff.failed.increment(1);
                failed(&target, &error, &mut tried.decode);
                if error.code == Code::HandoffFailed {
                    // It may be the other side that cannot be reached.
                    tried.prefill.push(Failed::worker(by.id().clone()));
                    return Err(error.into());
                }
                // What no engine has seen is still good for another worker.
                let computed = (!error.began).then(|| Computed {
                    held: Held::until(params, until, releaser),
                    by,
                    transfer_id,
                    delta,
                });
                Err(Broken { error, computed })
            }
        }
    }

    /// Notes that an answer has begun, for which `fetched` tokens' KV went from one engine to the other.
    fn begun(&self, mut attempt: Attempt, prompt: Delta, fetched: u64, since: Instant) -> Attempt {
        let took = since.elapsed();
        self.metrics.handoff.transfer.record(took);
        self.metrics.handoff.done.increment(1);
        self.measured
            .lock()
            .transfer
            .add(fetched as f64, took.as_secs_f64());
        attempt.preface(prompt.prompt_logprobs, prompt.cached_tokens);
        attempt
    }
}

/// Notes that a worker failed.
pub(super) fn failed(target: &Target, error: &DispatchError, tried: &mut Failures) {
    let failed = target.failed(error.code);
    if error.code.is_retryable() {
        tried.push(failed);
    }
}

/// Returns what a prefill worker is sent.
pub(super) fn prefill_request(order: &Order) -> GenerateRequest {
    GenerateRequest {
        deadline_ms: order.time_left(),
        dp_rank: None,
        leg: Leg::Prefill.into(),
        ..GenerateRequest::clone(&order.request)
    }
}

fn decode_request(
    order: &Order,
    params: Bytes,
    until: Instant,
    transfer_id: String,
) -> GenerateRequest {
    let lease = until.saturating_duration_since(Instant::now());
    let mut request = GenerateRequest {
        kv_lease_ms: u64::try_from(lease.as_millis()).ok(),
        deadline_ms: order.time_left(),
        kv_transfer_params: params,
        leg: Leg::Decode.into(),
        transfer_id,
        ..GenerateRequest::clone(&order.request)
    };
    // The prefill engine has them; this one would have to compute the prompt again.
    if let Some(sampling) = &mut request.sampling
        && sampling.prompt_logprobs.take().is_some()
    {
        sampling.skip_reading_prefix_cache = None;
    }
    request
}

/// Returns the error of a request for which no two workers could be found.
pub(super) fn no_pair(order: &Order) -> DispatchError {
    let message = match order.route.as_deref() {
        Some(route) if route.worker.is_some() || route.prefill_worker.is_some() => {
            "the workers that the request names do not take it, or do not fit each other"
        }
        Some(_) | None => "no decode worker and prefill worker of this model fit each other",
    };
    DispatchError::new(Code::Unavailable, message)
}
