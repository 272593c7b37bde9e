//! When workers that call their models, or their adapters, the same do serve the same, and what is different if not.

use std::collections::HashMap;

use stator_common::card::{self, Card};
use stator_text::{reasoning, tools};

use super::group::Group;

/// Says whether a worker fits those that are there, and if not, why.
///
/// - `groups`: by model id.
pub(super) fn check(card: &Card, groups: &HashMap<String, Group>) -> Result<(), String> {
    let Some(id) = card.model.names.first() else {
        return Err("its model has no name".to_owned());
    };
    check_parsers(&card.model)?;
    if let Some(group) = groups.get(id) {
        if group.fingerprint != card.model.fingerprint() {
            return Err(disagreement(&group.model, &card.model));
        }
        let others = group.adapters();
        let differs = |adapter: &&card::Adapter| {
            let other = others.get(&adapter.name[..]);
            other.is_some_and(|other| other.hash != adapter.hash)
        };
        if let Some(adapter) = card.adapters.iter().find(differs) {
            let name = &adapter.name;
            return Err(format!("other workers serve another adapter as {name}"));
        }
    }
    let taken = groups.iter().find_map(|(other, group)| {
        let name = if other == id {
            // Those of adapters are agreed upon.
            let mut own = group.model.names.iter().map(String::as_str);
            own.find(|name| card.serves(name))
        } else {
            group
                .names()
                .find(|name| card.serves(name) || card.model.names.iter().any(|own| own == name))
        };
        Some(format!("the name {} belongs to the model {other}", name?))
    });
    taken.map_or(Ok(()), Err)
}

/// Says why answers of a model could not be read: vLLM's own server does not start with such a name, either.
fn check_parsers(model: &card::Model) -> Result<(), String> {
    if let Some(name) = &model.tool_call_parser {
        tools::check(name).map_err(|error| error.to_string())?;
    }
    if let Some(name) = &model.reasoning_parser {
        reasoning::check(name).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Says what is different between a model and a worker that calls its own model the same.
fn disagreement(ours: &card::Model, theirs: &card::Model) -> String {
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
