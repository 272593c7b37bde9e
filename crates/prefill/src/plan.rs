//! A prompt is computed, its first token chosen, and its KV kept for whoever comes with the parameters.

use stator_common::{
    Code,
    proto::worker::{Delta, Error, FinishReason, GenerateRequest, Leg},
};
use stator_engine::HandOff;
use stator_worker::plan::{self, Plan, Progress};

/// What a prefill worker does to requests.
#[derive(Clone, Debug)]
pub struct Prefill {
    handoff: HandOff,
}

impl Prefill {
    /// - `handoff`: how the engines keep KV for others.
    pub fn new(handoff: HandOff) -> Self {
        Self { handoff }
    }
}

impl Plan for Prefill {
    fn request(&self, request: &mut GenerateRequest) -> Result<Leg, Error> {
        let leg = plan::leg(request)?;
        if leg != Leg::Prefill {
            let why = "this worker is a prefill one; it computes prompts for decode workers (LEG_PREFILL) \
                       and nothing else";
            return Err(plan::wrong_leg(leg, why));
        }
        if !request.kv_transfer_params.is_empty() {
            let why = "a prefill leg has no kv_transfer_params: it is where they come from";
            return Err(plan::invalid(why, "kv_transfer_params"));
        }
        let params = self.handoff.produce(&request.transfer_id);
        request.kv_transfer_params =
            params.map_err(|error| plan::invalid(error.to_string(), error.field()))?;
        // Everything else stays: the first token must be the one that the decode engine will choose.
        if let Some(sampling) = &mut request.sampling {
            sampling.max_tokens = 1;
            sampling.min_tokens = sampling.min_tokens.min(1);
            if self.handoff.needs_length_end() {
                sampling.ignore_eos = true;
                let stops = std::mem::take(&mut sampling.stop_token_ids);
                // Still masked where min_tokens says so.
                sampling.all_stop_token_ids.extend(stops);
            }
        }
        Ok(leg)
    }

    fn delta(&self, _: &Progress, delta: &mut Delta) {
        match delta.finish() {
            FinishReason::Unspecified | FinishReason::Error => {}
            FinishReason::Stop
            | FinishReason::Length
            | FinishReason::Abort
            | FinishReason::Repetition => {
                if !delta.kv_transfer_params.is_empty() {
                    let left = self.handoff.lease_left(&delta.kv_transfer_params);
                    delta.kv_lease_ms = u64::try_from(left.as_millis()).ok();
                } else if self.handoff.answers() {
                    let message = format!(
                        "the engine computed the prompt but kept no KV of it: {} answered without \
                         kv_transfer_params",
                        self.handoff.connector.name()
                    );
                    plan::fail(delta, Code::Internal, message);
                }
            }
        }
    }

    fn outlives_cancel(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
