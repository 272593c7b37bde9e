//! When workers that call their models the same do serve the same, and what is different if not.

use stator_common::card;

/// Says what is different between a model and a worker that calls its own model the same.
pub(super) fn disagreement(ours: &card::Model, theirs: &card::Model) -> String {
    let files = ours.files.keys().chain(theirs.files.keys());
    let mut different: Vec<String> = files
        .filter(|name| ours.files.get(*name) != theirs.files.get(*name))
        .map(|name| format!("file {name}"))
        .collect();
    different.sort();
    different.dedup();
    let values = [
        (
            "names",
            format!("{:?}", ours.names),
            format!("{:?}", theirs.names),
        ),
        (
            "max_model_len",
            ours.max_model_len.to_string(),
            theirs.max_model_len.to_string(),
        ),
        (
            "vocab_size",
            ours.vocab_size.to_string(),
            theirs.vocab_size.to_string(),
        ),
        (
            "block_size",
            ours.block_size.to_string(),
            theirs.block_size.to_string(),
        ),
        (
            "tool_call_parser",
            name(&ours.tool_call_parser),
            name(&theirs.tool_call_parser),
        ),
        (
            "reasoning_parser",
            name(&ours.reasoning_parser),
            name(&theirs.reasoning_parser),
        ),
    ];
    let values = values
        .into_iter()
        .filter(|(_, ours, theirs)| ours != theirs);
    different.extend(values.map(|(what, ours, theirs)| format!("{what} ({theirs}, not {ours})")));
    format!(
        "it disagrees with the workers that serve the model: {}",
        different.join(", ")
    )
}

fn name(parser: &Option<String>) -> String {
    parser.clone().unwrap_or_else(|| "none".to_owned())
}
