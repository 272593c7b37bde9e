//! A prompt's KV is fetched by the parameters, then the answer is generated. A prompt is computed here only
//! where the request says so.

use stator_common::{
    Code,
    proto::worker::{self, Delta, Error, FinishReason, GenerateRequest, Leg},
};
use stator_engine::HandOff;
use stator_worker::plan::{self, Plan, Progress};
use tracing::warn;

/// What a decode worker does to requests.
#[derive(Clone, Debug)]
pub struct Decode {
    handoff: HandOff,
}

impl Decode {
    /// - `handoff`: how the engines fetch KV from others.
    pub fn new(handoff: HandOff) -> Self {
        Self { handoff }
    }

    /// Checks the parameters of a request that has to have some.
    fn fetch(&self, request: &mut GenerateRequest) -> Result<(), Error> {
        if request.kv_transfer_params.is_empty() {
            let why = "this leg needs the kv_transfer_params of a prefill worker";
            return Err(plan::invalid(why, "kv_transfer_params"));
        }
        let given = std::mem::take(&mut request.kv_transfer_params);
        let params = self.handoff.fetch(given, &request.transfer_id);
        request.kv_transfer_params =
            params.map_err(|error| plan::invalid(error.to_string(), error.field()))?;
        Ok(())
    }
}

impl Plan for Decode {
    fn request(&self, request: &mut GenerateRequest) -> Result<Leg, Error> {
        let leg = plan::leg(request)?;
        match leg {
            Leg::Decode => {
                self.fetch(request)?;
                if let Some(sampling) = &mut request.sampling {
                    // The prefill leg gave them, and with them the engine would compute the whole prompt again.
                    sampling.prompt_logprobs = None;
                    sampling.skip_reading_prefix_cache = None;
                }
            }
            Leg::Release => self.fetch(request)?,
            Leg::Local if request.kv_transfer_params.is_empty() => {}
            Leg::Local => {
                let why = "a local leg has no kv_transfer_params: the prompt is computed here";
                return Err(plan::invalid(why, "kv_transfer_params"));
            }
            Leg::Unspecified => {
                let why = "the hand-off is missing: a decode worker continues what a prefill worker computed \
                           (LEG_DECODE), and computes a prompt only if the request says LEG_LOCAL";
                return Err(plan::wrong_leg(leg, why));
            }
            Leg::Prefill => {
                let why = "this worker is a decode one; prompts for others are computed by prefill workers";
                return Err(plan::wrong_leg(leg, why));
            }
        }
        Ok(leg)
    }

    fn delta(&self, progress: &Progress, delta: &mut Delta) {
        if progress.leg != Leg::Decode || progress.started {
            return;
        }
        let unexplained = delta.finish() == FinishReason::Error
            && delta.error.as_ref().map(Error::code) == Some(worker::Code::Internal);
        if unexplained {
            // vLLM up to 0.33 gives no reason for it (scheduler.py, `_handle_invalid_blocks`).
            let message = "the engine could not fetch the prompt's KV; its log says why";
            plan::fail(delta, Code::HandoffFailed, message);
            return;
        }
        let recomputed = progress.recomputed(delta).unwrap_or_default();
        if recomputed > self.handoff.tail() {
            warn!(
                recomputed,
                prompt_tokens = progress.prompt_tokens,
                connector = self.handoff.connector.name(),
                "the engine computed a prompt again whose KV another one had"
            );
        }
    }
}

#[cfg(test)]
mod tests;
