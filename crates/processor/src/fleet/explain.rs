//! What would become of a request, without sending it.

use serde_json::{Value, json};
use stator_common::proto::worker::GenerateRequest;
use stator_router::Terms;

use super::{Fleet, Order, Way};
use crate::pool::{Ask, Considered};

impl Fleet {
    /// Says who could serve a request, what it would cost there, and who would get it. Nothing is booked.
    ///
    /// Of a hand-off, each leg is explained by itself; that two workers must fit each other is left out.
    pub(crate) fn explain(&self, order: &Order) -> Value {
        let request = &*order.request;
        let tokens = request.prompt_tokens.len() / size_of::<u32>();
        let legs = match self.way(&request.lora) {
            Err(lacks) => return json!({"prompt_tokens": tokens, "unavailable": lacks}),
            Ok(Way::Aggregated) => vec![leg("agg", &self.agg.consider(&order.ask(request)))],
            Ok(Way::Disaggregated) => {
                // As for the real one: a rank that the client named is one of the engine that answers.
                let prompt = GenerateRequest {
                    dp_rank: None,
                    ..request.clone()
                };
                let decode = Ask {
                    prefilled: true,
                    ..order.ask(request)
                };
                vec![
                    leg(
                        "prefill",
                        &self.prefill.consider(&order.ask_prefill(&prompt)),
                    ),
                    leg("decode", &self.decode.consider(&decode)),
                ]
            }
        };
        json!({"prompt_tokens": tokens, "blocks": order.blocks.len(), "legs": legs})
    }
}

fn leg(role: &str, considered: &[Considered]) -> Value {
    let chosen = considered.iter().find_map(|one| {
        let why = one.chosen.as_ref()?;
        let target = &one.target;
        Some(json!({
            "worker": target.worker.id(),
            "dp_rank": target.dp_rank,
            "reason": why.to_string(),
        }))
    });
    let candidates: Vec<_> = considered.iter().map(candidate).collect();
    json!({"role": role, "chosen": chosen, "candidates": candidates})
}

fn candidate(one: &Considered) -> Value {
    let Terms {
        cached,
        uncached,
        queued,
        decoding,
        cost,
        full,
        ..
    } = one.terms;
    let target = &one.target;
    json!({
        "worker": target.worker.id(),
        "dp_rank": target.dp_rank,
        "cached_tokens": {
            "device": cached.device,
            "host": cached.host,
            "storage": cached.storage,
        },
        "uncached_tokens": uncached,
        "queued_tokens": queued,
        "decoding_tokens": decoding,
        "requests": target.load().requests,
        "full": full,
        "cost": cost,
    })
}
