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
use stator_common::card::HandOffProtocol;
use stator_common::plane::tcp::delta;
use stator_common::proto::worker::{Delta, FinishReason, GenerateRequest, Leg};
use stator_common::{Code, WorkerId};
use stator_router::{Place, Situation};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::held::Held;
use super::{Fleet, Order};
use crate::pool::{Ask, Attempt, Booked, DispatchError, Target, Worker};

/// Times that the chain is begun, at most. As for single workers: more failures in a row are not the workers' fault.
const MAX_ATTEMPTS: usize = 4;
/// The lease of an engine that does not tell it: vLLM's default (`kv_lease_duration`, 0.32).
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// Workers that failed this request, by leg.
#[derive(Default)]
struct Tried {
    prefill: SmallVec<[WorkerId; MAX_ATTEMPTS]>,
    decode: SmallVec<[WorkerId; MAX_ATTEMPTS]>,
}

/// A prompt that is computed.
struct Computed {
    held: Held,
    by: WorkerId,
    /// What both engines know the hand-off by, where they need that.
    transfer_id: String,
    /// What the prefill engine said.
    delta: Delta,
}

/// Why one run through the chain failed.
struct Broken {
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
        let mut computed = None;
        let mut last: Option<DispatchError> = None;
        for attempt in 1.. {
            let Some(chosen) = self.choose(order, &mut tried) else {
                // The failure of a worker that was there says more than the absence of others.
                return Err(last.unwrap_or_else(|| no_pair(order)));
            };
            let run = self.run(order, &mut tried, chosen, computed.take()).await;
            let broken = match run {
                Ok(attempt) => return Ok(attempt),
                Err(broken) => broken,
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
        let place = self.place(&decode, &prefill);
        if place.is_local() {
            debug!(request = order.request.request_id, %place, "hand-off decided");
            // What was booked for a hand-off goes before the same decode workers are asked again.
            drop((decode, prefill));
            return Ok(self.locally(order, tried).await?);
        }
        let computed = match computed.filter(|computed| computed.held.is_fresh()) {
            Some(computed) => computed,
            None => self.compute(order, tried, prefill, &decode).await?,
        };
        if !computed.held.is_fresh() {
            self.metrics.handoff.expired.increment(1);
            warn!(request = order.request.request_id, worker = %computed.by, "the lease was over before the decode leg");
            let message = "the prefill engine's lease was over before anybody could fetch";
            return Err(DispatchError::new(Code::HandoffFailed, message).into());
        }
        self.continue_at(order, tried, decode, computed).await
    }

    /// Chooses a decode worker and a prefill worker that can work together.
    fn choose(&self, order: &Order, tried: &mut Tried) -> Option<(Booked, Booked)> {
        let request = &*order.request;
        // A rank that the client named is one of the engine that answers.
        let prompt = GenerateRequest {
            dp_rank: None,
            prompt_tokens: request.prompt_tokens.clone(),
            ..GenerateRequest::default()
        };
        let mut alone: SmallVec<[WorkerId; MAX_ATTEMPTS]> = tried.decode.clone();
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
            let found = |tried: &[WorkerId]| {
                let ask = Ask {
                    partner,
                    tried,
                    ..order.ask_prefill(&prompt)
                };
                self.prefill.choose(&ask)
            };
            match found(&tried.prefill).or_else(|| found(&[])) {
                Some(prefill) => return Some((decode, prefill)),
                None => alone.push(decode.worker().id().clone()),
            }
        }
    }

    /// Decides who computes the prompt.
    fn place(&self, decode: &Booked, prefill: &Booked) -> Place {
        let (ahead, at_decode) = (
            prefill.target().ledger.load(),
            decode.target().ledger.load(),
        );
        let situation = Situation {
            uncached: decode.uncached(),
            uncached_at_prefill: prefill.uncached(),
            // This request itself is booked already.
            prefill_queue: ahead.prefill_tokens.saturating_sub(prefill.uncached()),
            decode_queue: at_decode.prefill_tokens,
            streams: at_decode.requests.saturating_sub(1),
        };
        self.conditional.place(&situation, &self.measured.lock())
    }

    /// Lets a decode worker do all of it.
    async fn locally(&self, order: &Order, tried: &mut Tried) -> Result<Attempt, DispatchError> {
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
        let (worker, work) = (
            booked.worker().clone(),
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
                failed(&worker, &error, &mut tried.decode);
                Err(error)
            }
        }
    }

    /// Lets a prefill worker compute the prompt, after the first of its choices.
    async fn compute(
        &self,
        order: &Order,
        tried: &mut Tried,
        prefill: Booked,
        decode: &Booked,
    ) -> Result<Computed, DispatchError> {
        let request = GenerateRequest {
            deadline_ms: order.time_left(),
            dp_rank: None,
            leg: Leg::Prefill.into(),
            ..GenerateRequest::clone(&order.request)
        };
        // For the first choice; a later one goes where the prompt is cached, if that worker still takes it.
        let chosen = parking_lot::Mutex::new(Some(prefill));
        let failures = parking_lot::Mutex::new(&mut tried.prefill);
        let compute = |cached_at: Option<WorkerId>| {
            let booked = chosen.lock().take();
            let (request, failures) = (&request, &failures);
            async move {
                let moved = cached_at
                    .filter(|at| {
                        booked
                            .as_ref()
                            .is_none_or(|booked| booked.worker().id() != at)
                    })
                    .and_then(|at| {
                        self.prefill.choose(&Ask {
                            preferred: Some(&at),
                            partner: Some(decode.worker()),
                            tried: &failures.lock(),
                            ..order.ask_prefill(request)
                        })
                    });
                let gone =
                    || DispatchError::new(Code::Unavailable, "no prefill worker is connected");
                let booked = moved.or(booked).ok_or_else(gone)?;
                let worker = booked.worker().clone();
                let computed = self.prefill(order, booked, request).await;
                if let Err(error) = &computed {
                    failed(&worker, error, &mut failures.lock());
                }
                computed
            }
        };
        let by = |computed: &Computed| computed.by.clone();
        order.siblings.compute(compute, by).await
    }

    /// Runs the prefill leg.
    async fn prefill(
        &self,
        order: &Order,
        booked: Booked,
        request: &GenerateRequest,
    ) -> Result<Computed, DispatchError> {
        let by = booked.worker().id().clone();
        let work = booked.target().ledger.load().prefill_tokens;
        let peer = peer(booked.target());
        let transfer_id = transfer_id(booked.worker());
        let since = Instant::now();
        let begun = if transfer_id.is_empty() {
            booked.begin(request).await
        } else {
            let request = GenerateRequest {
                transfer_id: transfer_id.clone(),
                ..request.clone()
            };
            booked.begin(&request).await
        };
        let mut attempt = begun?;
        let mut delta = Delta::default();
        while let Some(next) = attempt.next().await {
            delta::merge(&mut delta, next);
        }
        match delta.finish() {
            FinishReason::Stop | FinishReason::Length => {}
            _ => {
                let error = delta.error.take();
                return Err(match error {
                    Some(error) => DispatchError::new(error.code().into(), error.message),
                    None => DispatchError::new(Code::Unavailable, "the prefill was given up"),
                });
            }
        }
        let answered = std::mem::take(&mut delta.kv_transfer_params);
        let params = Some(answered).filter(|params| !params.is_empty()).or(peer);
        let Some(params) = params else {
            let message = "the prefill worker computed the prompt and handed nothing on";
            return Err(DispatchError::new(Code::Internal, message));
        };
        let took = since.elapsed();
        self.metrics.handoff.prefill.record(took);
        self.measured
            .lock()
            .prefill
            .add(work as f64, took.as_secs_f64());
        debug!(request = order.request.request_id, worker = %by, ?took, "prompt computed");
        let lease = delta
            .kv_lease_ms
            .map_or(DEFAULT_LEASE, Duration::from_millis);
        Ok(Computed {
            held: Held::new(params, lease, &self.releaser),
            by,
            transfer_id,
            delta,
        })
    }

    /// Runs the decode leg up to its first token.
    async fn continue_at(
        &self,
        order: &Order,
        tried: &mut Tried,
        decode: Booked,
        computed: Computed,
    ) -> Result<Attempt, Broken> {
        let worker = decode.worker().clone();
        let fetched = decode.uncached();
        let Computed {
            held,
            by,
            transfer_id,
            delta,
        } = computed;
        let (params, until) = held.take();
        let request = decode_request(order, params.clone(), transfer_id.clone());
        let since = Instant::now();
        match decode.begin(&request).await {
            Ok(attempt) => Ok(self.begun(attempt, delta, fetched, since)),
            Err(error) => {
                self.metrics.handoff.failed.increment(1);
                failed(&worker, &error, &mut tried.decode);
                if error.code == Code::HandoffFailed {
                    // It may be the other side that cannot be reached.
                    tried.prefill.push(by);
                    return Err(error.into());
                }
                // What no engine has seen is still good for another worker.
                let computed = (!error.began).then(|| Computed {
                    held: Held::until(params, until, &self.releaser),
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

/// Returns the id that both engines of a pair need, where they know a hand-off by one. Else empty.
fn transfer_id(prefill: &Worker) -> String {
    let handoff = prefill.card().handoff.as_ref();
    match handoff.map(|handoff| handoff.protocol) {
        Some(HandOffProtocol::RouterAllocated) => format!("{:032x}", rand::random::<u128>()),
        Some(HandOffProtocol::ResponseCarried) | None => String::new(),
    }
}

/// Returns how a decode engine finds this prefill engine if the answer does not say it.
fn peer(prefill: &Target) -> Option<Bytes> {
    let handoff = prefill.worker.card().handoff.as_ref()?;
    let peer = handoff.peers.get(prefill.dp_rank.unwrap_or(0) as usize)?;
    Some(hex::decode(peer).ok()?.into())
}

/// Notes that a worker failed.
fn failed(worker: &Worker, error: &DispatchError, tried: &mut SmallVec<[WorkerId; MAX_ATTEMPTS]>) {
    worker.failed(error.code);
    if error.code.is_retryable() {
        tried.push(worker.id().clone());
    }
}

fn decode_request(order: &Order, params: Bytes, transfer_id: String) -> GenerateRequest {
    let mut request = GenerateRequest {
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
fn no_pair(order: &Order) -> DispatchError {
    let message = match order.route.as_deref() {
        Some(route) if route.worker.is_some() || route.prefill_worker.is_some() => {
            "the workers that the request names do not take it, or do not fit each other"
        }
        Some(_) | None => "no decode worker and prefill worker of this model fit each other",
    };
    DispatchError::new(Code::Unavailable, message)
}
