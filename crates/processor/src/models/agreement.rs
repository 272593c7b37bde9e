//! When workers that call their models, or their adapters, the same do serve the same, and what is different if not.

use std::collections::{HashMap, HashSet};

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
    check_adapters(card)?;
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
    // Those of the same model are agreed upon.
    let mut others = groups.iter().filter(|(other, _)| *other != id);
    let taken = others.find_map(|(other, group)| {
        let mut names = group.names();
        let name =
            names.find(|name| card.serves(name) || card.model.names.iter().any(|own| own == name));
        Some(format!("the name {} belongs to the model {other}", name?))
    });
    taken.map_or(Ok(()), Err)
}

/// Says whether a client's name could mean two things, or none, at one worker.
fn check_adapters(card: &Card) -> Result<(), String> {
    let mut known = HashSet::new();
    for adapter in &card.adapters {
        let name = &adapter.name[..];
        if name.is_empty() {
            return Err("one of its adapters has no name".to_owned());
        }
        if card.model.names.iter().any(|own| own == name) {
            return Err(format!("its adapter {name} has a name of its model"));
        }
        if !known.insert(name) {
            return Err(format!("two of its adapters are called {name}"));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use stator_testkit::{card, model};

    use super::*;

    #[test]
    fn the_first_worker_of_a_model_is_refused_too_if_an_adapters_name_is_not_its_own() {
        let refused = |adapters: &[&str]| {
            let mut card = card::card("a");
            card.adapters = adapters.iter().map(|name| model::adapter(name)).collect();
            check(&card, &HashMap::new()).err()
        };
        assert_eq!(refused(&["x", "y"]), None);
        for (adapters, reason) in [
            (&["x", "m"][..], "its adapter m has a name of its model"),
            (&["x", "y", "x"], "two of its adapters are called x"),
            (&[""], "one of its adapters has no name"),
        ] {
            assert_eq!(refused(adapters).as_deref(), Some(reason));
        }
    }
}
