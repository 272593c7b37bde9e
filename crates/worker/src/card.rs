//! What the worker publishes, from its configuration and what its engines say of themselves.

use stator_common::{
    Card, WorkerId,
    card::{Model, Role},
};
use stator_engine::Engine;

use crate::{config::Config, files::Files};

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
    let (tool_call_parser, reasoning_parser) = parsers(config);
    Some(Card {
        worker: worker.clone(),
        role,
        endpoint: config.place(role),
        address: address.to_owned(),
        // Their files are read by whoever publishes it.
        adapters: Vec::new(),
        // How KV comes and goes is the connectors' to say.
        handoff: None,
        // And so are events.
        kv_events: None,
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
            tool_call_parser,
            reasoning_parser,
            vllm_version: info.vllm_version.clone(),
            max_logprobs: i32::try_from(first.limits().max_logprobs).unwrap_or(i32::MAX),
        },
    })
}

/// Returns the parsers for tool calls and for reasoning that processors are told of.
pub(crate) fn parsers(config: &Config) -> (Option<String>, Option<String>) {
    let parser = |own: &Option<String>| own.clone().filter(|name| !name.is_empty());
    let reasoning =
        parser(&config.dyn_reasoning_parser).or_else(|| parser(&config.reasoning_parser));
    (parser(&config.tool_call_parser), reasoning)
}
