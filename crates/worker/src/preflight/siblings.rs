//! Whether the workers of the other side, as far as they are known already, can work with this one.

use std::time::Duration;

use stator_common::{
    Card,
    card::Role,
    discovery::{Discovery, Event},
};
use stator_engine::{HandOff, flags::Given};
use tokio::time;

use super::{Finding, Subject};
use crate::{config::Config, launch::size};

/// Discovery tells what is there at once; whoever comes later than this is new.
const QUIET: Duration = Duration::from_millis(300);

/// What this worker is, as far as it is known before its engine runs.
struct Own<'a> {
    config: &'a Config,
    role: Role,
    handoff: HandOff,
    tensor: u32,
    block_size: Option<u32>,
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
    let own = Own {
        config,
        role: subject.role,
        handoff,
        tensor: size(&given, "tensor-parallel-size"),
        block_size: given.value("block-size").and_then(|size| size.parse().ok()),
    };
    let names = config.names();
    let place = config.place(subject.role);
    let cards = known(subject.discovery).await.into_iter().filter(|card| {
        card.role == other
            && card.endpoint.namespace == place.namespace
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

fn judge(own: &Own<'_>, other: Role, cards: &[Card]) -> Vec<Finding> {
    if cards.is_empty() {
        let found = format!("no {other} worker of this model is known yet");
        return vec![Finding::fine("other side", found)];
    }
    let judged: Vec<(Vec<String>, &Card)> = cards
        .iter()
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
                      --served-model-name of its own";
        // Among others that fit it may be one of an upgrade that is under way.
        findings.push(if fitting > 0 {
            Finding::warning("other side", found, remedy)
        } else {
            Finding::error("other side", found, remedy)
        });
    }
    let sizes = cards.iter().filter(|card| {
        own.block_size
            .is_some_and(|own| own != card.model.block_size)
    });
    for card in sizes {
        findings.push(Finding::warning(
            "other side",
            format!(
                "{} has KV blocks of {} tokens, this worker of {}",
                card.worker,
                card.model.block_size,
                own.block_size.unwrap_or_default()
            ),
            "the same --block-size on both sides: not every connector and layout can convert",
        ));
    }
    findings
}

/// Returns in what a hand-off between the two would fail.
fn differences(own: &Own<'_>, card: &Card) -> Vec<String> {
    let mut why = Vec::new();
    let mut differ = |what: &str, theirs: &str, ours: &str| {
        if theirs != ours {
            why.push(format!("{what} is {theirs} there and {ours} here"));
        }
    };
    if let Some(vllm) = &own.config.vllm {
        differ("vLLM", &card.model.vllm_version, &vllm.schema.vllm_version);
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
    if prefill == 0 || !decode.is_multiple_of(prefill) {
        why.push(format!(
            "a decode engine over {decode} devices cannot take KV from a prefill engine over {prefill}: \
             it must be as many or a multiple"
        ));
    }
    why
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use stator_common::{
        WorkerId,
        card::{self, HandOffProtocol, Model},
        discovery::mem::Mem,
    };
    use stator_engine::handoff::Connector;

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
            worker: WorkerId("prefill-1".to_owned()),
            role: Role::Prefill,
            endpoint: config().place(Role::Prefill),
            address: "127.0.0.1:1".to_owned(),
            model: Model {
                names: vec!["m".to_owned()],
                root: "/m".to_owned(),
                max_model_len: 64,
                vocab_size: 1,
                block_size: 32,
                kv_blocks: 1,
                max_num_seqs: 1,
                max_num_batched_tokens: 1,
                dp_size: 1,
                files: BTreeMap::new(),
                tool_call_parser: None,
                reasoning_parser: None,
                vllm_version: "0.32.0".to_owned(),
                max_logprobs: 20,
            },
            handoff: Some(card::HandOff {
                connector: "NixlConnector".to_owned(),
                protocol: HandOffProtocol::ResponseCarried,
                tensor_parallel_size: 1,
                lease_ms: 30_000,
                peers: Vec::new(),
            }),
            kv_events: None,
        };
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
        type Change = fn(&mut Card);
        let changes: [(Change, &str); 4] = [
            (
                |card| card.model.root = "/n".to_owned(),
                "/n there and /m here",
            ),
            (
                |card| card.handoff.as_mut().unwrap().connector = "NixlPushConnector".to_owned(),
                "NixlPushConnector there",
            ),
            (
                |card| card.handoff.as_mut().unwrap().tensor_parallel_size = 4,
                "over 2 devices cannot take KV from a prefill engine over 4",
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
        let sizes = judged(&[prefill(|card| card.model.block_size = 16)]);
        assert_eq!(sizes[1].severity, Severity::Warning);
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
