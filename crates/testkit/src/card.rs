//! The card of a worker that nobody talks to.

use std::collections::BTreeMap;

use stator_common::{
    WorkerId,
    card::{Card, Endpoint, Model, Role},
};

/// Returns the card of an aggregated worker of that name.
pub fn card(worker: &str) -> Card {
    Card {
        worker: WorkerId(worker.to_owned()),
        role: Role::Agg,
        endpoint: Endpoint {
            namespace: "test".to_owned(),
            component: "backend".to_owned(),
            endpoint: "generate".to_owned(),
        },
        address: "127.0.0.1:1".to_owned(),
        model: Model {
            names: vec!["m".to_owned()],
            root: "/m".to_owned(),
            max_model_len: 2048,
            vocab_size: 100,
            block_size: 16,
            kv_blocks: 10,
            max_num_seqs: 8,
            max_num_batched_tokens: 2048,
            dp_size: 1,
            files: BTreeMap::new(),
            tool_call_parser: None,
            reasoning_parser: None,
            vllm_version: "0.32.0".to_owned(),
            max_logprobs: 20,
        },
        handoff: None,
        kv_events: None,
        adapters: Vec::new(),
    }
}
