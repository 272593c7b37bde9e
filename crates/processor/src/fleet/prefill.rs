//! The prefill leg: a prompt is computed by one engine, and its KV kept for another.

use std::time::Duration;

use bytes::Bytes;
use stator_common::card::HandOffProtocol;
use stator_common::plane::delta;
use stator_common::proto::worker::{Delta, FinishReason, GenerateRequest, Leg};
use stator_common::{Code, WorkerId};
use tokio::time::Instant;
use tracing::debug;

use super::handoff::{Tried, failed};
use super::held::Held;
use super::{Fleet, Order};
use crate::pool::{Ask, Booked, DispatchError, Target};

/// The lease of an engine that does not tell it: vLLM's default (`kv_lease_duration`, 0.32).
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

/// A prompt that is computed.
pub(super) struct Computed {
    pub(super) held: Held,
    pub(super) by: WorkerId,
    /// What both engines know the hand-off by, where they need that.
    pub(super) transfer_id: String,
    /// What the prefill engine said.
    pub(super) delta: Delta,
}

impl Fleet {
    /// Lets a prefill worker compute the prompt, after the first of its choices.
    pub(super) async fn compute(
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
                            cached: true,
                            ..order.ask_prefill(request)
                        })
                    });
                let gone =
                    || DispatchError::new(Code::Unavailable, "no prefill worker is connected");
                let booked = moved.or(booked).ok_or_else(gone)?;
                let target = booked.target().clone();
                let computed = self.prefill(order, booked, request).await;
                if let Err(error) = &computed {
                    failed(&target, error, &mut failures.lock());
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
        let booked_as_cached = booked.uncached() == 0;
        let peer = peer(booked.target());
        let protocol = booked.worker().protocol();
        let transfer_id = transfer_id(protocol);
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
        // A later choice finds the prompt in the cache.
        if !booked_as_cached {
            self.measured
                .lock()
                .prefill
                .add(work as f64, took.as_secs_f64());
        }
        debug!(request = order.request.request_id, worker = %by, ?took, "prompt computed");
        let releaser = self.releaser(protocol);
        let lease = delta
            .kv_lease_ms
            .map_or(DEFAULT_LEASE, Duration::from_millis);
        Ok(Computed {
            held: Held::new(params, lease, releaser),
            by,
            transfer_id,
            delta,
        })
    }
}

/// Returns the id that both engines of a pair need, where they know a hand-off by one. Else empty.
fn transfer_id(protocol: HandOffProtocol) -> String {
    match protocol {
        HandOffProtocol::RouterAllocated => format!("{:032x}", rand::random::<u128>()),
        HandOffProtocol::ResponseCarried => String::new(),
    }
}

/// Returns how a decode engine finds this prefill engine if the answer does not say it.
fn peer(prefill: &Target) -> Option<Bytes> {
    let handoff = prefill.worker.card().handoff.as_ref()?;
    let peer = handoff.peers.get(prefill.dp_rank.unwrap_or(0) as usize)?;
    Some(hex::decode(peer).ok()?.into())
}
