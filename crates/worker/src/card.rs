//! What the worker publishes, from its configuration and what its engines say of themselves.

use stator_common::{
    Card, WorkerId,
    card::{HandOff, Model, Role},
};
use stator_engine::Engine;

use crate::{config::Config, files::Files, launch};

/// Returns how KV comes or goes, where it does.
fn handoff(config: &Config, role: Role) -> Option<HandOff> {
    let handoff = config.handoff(role).ok()??;
    Some(HandOff {
        connector: handoff.connector.name().to_owned(),
        protocol: handoff.connector.protocol(),
        tensor_parallel_size: launch::tensor_parallel_size(&config.engine_args),
        lease_ms: u64::try_from(handoff.lease.as_millis()).unwrap_or(u64::MAX),
        peers: Vec::new(),
    })
}

/// Describes a worker.
///
/// - `engines`: those that run, at least one; they run the same model.
pub(crate) fn describe(
    config: &Config,
    role: Role,
    worker: &WorkerId,
    address: &str,
    engines: &[Engine],
    files: &Files,
) -> Option<Card> {
    let first = engines.first()?;
    let info = first.info();
    let parser = |own: &Option<String>| own.clone().filter(|name| !name.is_empty());
    Some(Card {
        worker: worker.clone(),
        role,
        endpoint: config.place(role),
        address: address.to_owned(),
        handoff: handoff(config, role),
        model: Model {
            names: config.names(),
            root: config.model.clone(),
            max_model_len: info.max_model_len,
            vocab_size: info.vocab_size,
            block_size: info.block_size,
            kv_blocks: engines
                .iter()
                .map(|engine| u64::from(engine.info().num_gpu_blocks))
                .sum(),
            max_num_seqs: info.max_num_seqs,
            max_num_batched_tokens: info.max_num_batched_tokens,
            dp_size: config.data_parallel_size,
            files: files.named.clone(),
            tool_call_parser: parser(&config.tool_call_parser),
            reasoning_parser: parser(&config.dyn_reasoning_parser)
                .or_else(|| parser(&config.reasoning_parser)),
            vllm_version: info.vllm_version.clone(),
            max_logprobs: i32::try_from(first.limits().max_logprobs).unwrap_or(i32::MAX),
        },
    })
}
