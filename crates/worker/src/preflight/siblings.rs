//! Whether the workers that are known already can work with this one.
//!
//! One that fits nobody may still be the first of an upgrade, whose others follow: as long as the model is served
//! without it, that is a warning. It is an error where this worker was to complete the model and cannot: the other
//! side is there, nobody else of its own side is, and none of them fit.

use std::{collections::BTreeSet, time::Duration};

use stator_common::{
    Card,
    card::{Model, Role},
    discovery::{Discovery, Event},
};
use stator_engine::{HandOff, flags::Given, handoff::widths_fit, model};
use tokio::time;

use super::{Finding, Subject};
use crate::{card::parsers, config::Config, files::Files, launch::size};

/// Discovery tells what is there at once; whoever comes later than this is new.
const QUIET: Duration = Duration::from_millis(300);

/// What this worker is, as far as it is known before its engine runs.
struct Own<'a> {
    config: &'a Config,
    role: Role,
    handoff: HandOff,
    tensor: u32,
    /// What processors compare; absent where only the running engine knows.
    block_size: Option<u32>,
    max_model_len: Option<u32>,
    files: Option<Files>,
}

pub(super) async fn examine(subject: &Subject<'_>) -> Vec<Finding> {
    let config = subject.config;
    let other = match subject.role {
        Role::Prefill => Role::Decode,
        Role::Decode => Role::Prefill,
        Role::Agg | Role::Encode => return Vec::new(),
    };
    let Ok(Some(handoff)) = config.handoff(subject.role) else {
        return Vec::new();
    };
    let given = Given::read(&config.engine_args);
    let folder = model::folder(&config.model);
    // vLLM makes the blocks larger than it was told where layers of several kinds share them.
    let keeps_block_size = !given.has("kv-cache-dtype-skip-layers")
        && folder
            .as_deref()
            .is_some_and(|folder| !model::is_hybrid(folder));
    let number = |name| given.value(name).and_then(|value: &str| value.parse().ok());
    let template = config.chat_template.as_deref();
    let own = Own {
        config,
        role: subject.role,
        handoff,
        tensor: size(&given, "tensor-parallel-size"),
        block_size: number("block-size").filter(|_| keeps_block_size),
        max_model_len: number("max-model-len"),
        files: Files::read(
            &config.model,
            folder.as_deref(),
            template,
            &config.engine_args,
        )
        .ok(),
    };
    let names = config.names();
    let place = config.place(subject.role);
    let cards = known(subject.discovery).await.into_iter().filter(|card| {
        card.endpoint.namespace == place.namespace
            && card.model.names.iter().any(|name| names.contains(name))
    });
    judge(&own, other, &cards.collect::<Vec<_>>())
}

/// Returns who is there now.
async fn known(discovery: &dyn Discovery) -> Vec<Card> {
    let mut cards: Vec<Card> = Vec::new();
    let Ok(mut watch) = discovery.watch().await else {
        // Registering will say why.
        return cards;
    };
    while let Ok(Some(event)) = time::timeout(QUIET, watch.next()).await {
        match event {
            Event::Put(card) => {
                cards.retain(|known| known.worker != card.worker);
                cards.push(*card);
            }
            Event::Gone(worker) => cards.retain(|known| known.worker != worker),
        }
    }
    cards
}

/// - `cards`: those who call their model the same.
fn judge(own: &Own<'_>, other: Role, cards: &[Card]) -> Vec<Finding> {
    // Somebody serves with them, or is about to.
    let complete = cards
        .iter()
        .any(|card| [own.role, Role::Agg].contains(&card.role));
    let cards: Vec<&Card> = cards.iter().filter(|card| card.role == other).collect();
    if cards.is_empty() {
        let found = format!("no {other} worker of this model is known yet");
        return vec![Finding::fine("other side", found)];
    }
    let judged: Vec<(Vec<String>, &Card)> = cards
        .iter()
        .copied()
        .map(|card| (differences(own, card), card))
        .collect();
    let fitting = judged.iter().filter(|(why, _)| why.is_empty()).count();
    let mut findings = Vec::new();
    if fitting > 0 {
        let found = format!("{fitting} of {} {other} workers fit", cards.len());
        findings.push(Finding::fine("other side", found));
    }
    for (why, card) in judged.iter().filter(|(why, _)| !why.is_empty()) {
        let found = format!("{} does not fit: {}", card.worker, why.join("; "));
        let remedy = "start both sides alike in this, or give this pool a --namespace or a \
                      --served-model-name of its own; of an upgrade, the new ones serve when the old ones have gone";
        findings.push(if fitting > 0 || complete {
            Finding::warning("other side", found, remedy)
        } else {
            Finding::error("other side", found, remedy)
        });
    }
    findings
}

/// Returns in what a hand-off between the two would fail, and why processors would take them for two models (as
/// `Model::fingerprint` has it).
fn differences(own: &Own<'_>, card: &Card) -> Vec<String> {
    let mut why = files(own, &card.model);
    let model = &card.model;
    let mut differ = |what: &str, theirs: &str, ours: &str| {
        if theirs != ours {
            why.push(format!("{what} is {theirs} there and {ours} here"));
        }
    };
    if let Some(vllm) = &own.config.vllm {
        differ("vLLM", &card.model.vllm_version, &vllm.schema.vllm_version);
    }
    differ(
        "the list of names",
        &model.names.join(","),
        &own.config.names().join(","),
    );
    for (what, theirs, ours) in [
        ("the block size", model.block_size, own.block_size),
        ("max_model_len", model.max_model_len, own.max_model_len),
    ] {
        let ours = ours.unwrap_or(theirs);
        differ(what, &theirs.to_string(), &ours.to_string());
    }
    let named = |parser: &Option<String>| parser.clone().unwrap_or_else(|| "none".to_owned());
    let (tool_call, reasoning) = parsers(own.config);
    for (what, theirs, ours) in [
        ("the tool call parser", &model.tool_call_parser, tool_call),
        ("the reasoning parser", &model.reasoning_parser, reasoning),
    ] {
        differ(what, &named(theirs), &named(&ours));
    }
    // NIXL compares the name as it was given (nixl/metadata.py, `compute_nixl_compatibility_hash`).
    differ("the model", &card.model.root, &own.config.model);
    let Some(theirs) = &card.handoff else {
        why.push("it hands nothing on".to_owned());
        return why;
    };
    differ(
        "the connector",
        &theirs.connector,
        own.handoff.connector.name(),
    );
    let (prefill, decode) = if own.role == Role::Prefill {
        (own.tensor, theirs.tensor_parallel_size)
    } else {
        (theirs.tensor_parallel_size, own.tensor)
    };
    if !widths_fit(prefill, decode) {
        why.push(format!(
            "a decode engine over {decode} devices cannot take KV from a prefill engine over {prefill}: \
             one must be a multiple of the other"
        ));
    }
    why
}

/// Returns which files of the model are not the same.
fn files(own: &Own<'_>, theirs: &Model) -> Vec<String> {
    let Some(ours) = own.files.as_ref().map(|files| &files.named) else {
        return Vec::new();
    };
    let theirs = &theirs.files;
    let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| format!("{name} is not the same"))
        .collect()
}

#[cfg(test)]
mod tests {
    use stator_common::{
        card::{self, HandOffProtocol},
        discovery::mem::Mem,
    };
    use stator_engine::handoff::Connector;
    use stator_testkit as testkit;

    use super::*;
    use crate::preflight::Severity;

    fn config() -> Config {
        Config {
            model: "/m".to_owned(),
            served_model_name: vec!["m".to_owned()],
            engine_args: [
                "--kv-transfer-config",
                "{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_consumer\"}",
                "-tp",
                "2",
                "--block-size",
                "32",
            ]
            .map(String::from)
            .into(),
            ..Config::default()
        }
    }

    fn prefill(change: impl FnOnce(&mut Card)) -> Card {
        let mut card = Card {
            role: Role::Prefill,
            endpoint: config().place(Role::Prefill),
            handoff: Some(card::HandOff {
                connector: "NixlConnector".to_owned(),
                protocol: HandOffProtocol::ResponseCarried,
                tensor_parallel_size: 1,
                lease_ms: 30_000,
                peers: Vec::new(),
            }),
            ..testkit::card::card("prefill-1")
        };
        card.model.block_size = 32;
        change(&mut card);
        card
    }

    fn judged(cards: &[Card]) -> Vec<Finding> {
        let config = config();
        let own = Own {
            config: &config,
            role: Role::Decode,
            handoff: HandOff {
                connector: Connector::Nixl,
                lease: Duration::from_secs(30),
            },
            tensor: 2,
            block_size: Some(32),
            max_model_len: None,
            files: None,
        };
        judge(&own, Role::Prefill, cards)
    }

    #[test]
    fn a_side_that_cannot_work_with_this_one_is_an_error_that_says_in_what() {
        let fits = |change: fn(&mut Card)| {
            let findings = judged(&[prefill(change)]);
            (findings[0].severity, findings[0].found.clone())
        };
        assert_eq!(fits(|_| {}).0, Severity::Fine);
        // Either side may be the wider.
        let wider = |card: &mut Card| card.handoff.as_mut().unwrap().tensor_parallel_size = 4;
        assert_eq!(fits(wider).0, Severity::Fine);
        type Change = fn(&mut Card);
        let changes: [(Change, &str); 8] = [
            (
                |card| card.model.block_size = 16,
                "block size is 16 there and 32 here",
            ),
            (
                |card| card.model.names.push("n".to_owned()),
                "m,n there and m here",
            ),
            (
                |card| card.model.tool_call_parser = Some("hermes".to_owned()),
                "hermes there and none here",
            ),
            (
                |card| card.model.reasoning_parser = Some("qwen3".to_owned()),
                "qwen3 there and none here",
            ),
            (
                |card| card.model.root = "/n".to_owned(),
                "/n there and /m here",
            ),
            (
                |card| card.handoff.as_mut().unwrap().connector = "NixlPushConnector".to_owned(),
                "NixlPushConnector there",
            ),
            (
                |card| card.handoff.as_mut().unwrap().tensor_parallel_size = 3,
                "over 2 devices cannot take KV from a prefill engine over 3",
            ),
            (|card| card.handoff = None, "hands nothing on"),
        ];
        for (change, text) in changes {
            let (severity, found) = fits(change);
            assert_eq!(severity, Severity::Error);
            assert!(found.contains(text), "{found}");
        }
        assert_eq!(judged(&[])[0].severity, Severity::Fine);
    }

    #[test]
    fn one_that_does_not_fit_among_others_that_do_is_a_warning() {
        let findings = judged(&[
            prefill(|_| {}),
            prefill(|card| card.model.root = "/n".to_owned()),
        ]);
        let severities: Vec<_> = findings.iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Fine, Severity::Warning]);
    }

    #[test]
    fn the_first_of_an_upgrade_is_not_kept_from_starting() {
        let old = |card: &mut Card| card.model.vllm_version = "0.31.0".to_owned();
        let apart = |card: &mut Card| {
            old(card);
            card.handoff = None;
        };
        for role in [Role::Decode, Role::Agg] {
            let served = prefill(|card| {
                old(card);
                card.role = role;
            });
            assert_eq!(
                judged(&[prefill(apart), served])[0].severity,
                Severity::Warning,
                "{role}"
            );
        }
        assert_eq!(judged(&[prefill(apart)])[0].severity, Severity::Error);
    }

    #[test]
    fn what_only_the_running_engine_knows_is_not_compared_and_files_are() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let read = Files::read("m", Some(folder.path()), None, &[]).unwrap();
        let config = config();
        let mut own = Own {
            config: &config,
            role: Role::Decode,
            handoff: HandOff {
                connector: Connector::Nixl,
                lease: Duration::from_secs(30),
            },
            tensor: 2,
            block_size: None,
            max_model_len: None,
            files: None,
        };
        let card = prefill(|card| card.model.block_size = 544);
        assert_eq!(differences(&own, &card), Vec::<String>::new());
        own.files = Some(read);
        own.max_model_len = Some(128);
        assert_eq!(
            differences(&own, &card),
            [
                "config.json is not the same",
                "max_model_len is 2048 there and 128 here"
            ]
        );
    }

    #[tokio::test]
    async fn only_the_other_side_of_the_same_model_is_looked_at() {
        let discovery = Mem::default();
        let _other = discovery
            .register(prefill(|card| card.model.names = vec!["n".to_owned()]))
            .await
            .unwrap();
        let config = config();
        let subject = Subject {
            config: &config,
            role: Role::Decode,
            sides: &[],
            event_ports: &[],
            unbound: false,
            host: [127, 0, 0, 1].into(),
            discovery: &discovery,
        };
        assert!(
            examine(&subject).await[0]
                .found
                .contains("no prefill worker")
        );
        let _same = discovery.register(prefill(|_| {})).await.unwrap();
        assert!(examine(&subject).await[0].found.contains("1 of 1 prefill"));
    }
}
