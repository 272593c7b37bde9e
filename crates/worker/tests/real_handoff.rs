//! A prefill and a decode worker around real vLLM engines that hand KV on by NIXL. Fails where there is no vLLM, for a
//! test that nobody runs proves nothing; `STATOR_SKIP_REAL=1` says that this is meant.

mod support;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use stator_common::{
    Card,
    card::Role,
    discovery::mem::Mem,
    plane::Client,
    proto::worker::{Delta, FinishReason, GenerateRequest, Leg},
};
use stator_engine::introspect::introspect;
use stator_testkit::{
    client::{outcome, request},
    vllm::{self, Vllm},
    wait::PATIENCE,
};
use stator_worker::cli::EngineKind;
use support::Cluster;

/// Longer than anything here: what is let go of is not let go of because its lease was over.
const CONNECTOR: &str = r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu","kv_connector_extra_config":{"kv_lease_duration":3600}}"#;

async fn worker(role: Role, vllm: &Vllm) -> (Cluster, Card, Client) {
    let mut cluster = Cluster::start_as(role, Mem::default(), |config| {
        config.model = vllm.model.display().to_string();
        config.engine = Some(EngineKind::Vllm);
        config.engine_attach = None;
        config.python = Some(vllm.python.clone());
        config.vllm = Some(Arc::new(introspect(&vllm.python).expect("a vLLM")));
        let connector = ["--kv-transfer-config".to_owned(), CONNECTOR.to_owned()];
        config.engine_args = vllm::flags().chain(connector).collect();
    })
    .await;
    let card = cluster.card().await;
    let client = cluster.client().await;
    (cluster, card, client)
}

fn leg(leg: Leg, first: u32, params: &Bytes) -> GenerateRequest {
    GenerateRequest {
        leg: leg.into(),
        kv_transfer_params: params.clone(),
        ..request(first..first + 150, 16)
    }
}

async fn computed(prefill: &Client, first: u32) -> Delta {
    let computed = outcome(prefill, &leg(Leg::Prefill, first, &Bytes::new())).await;
    assert_eq!(computed.error, None);
    computed
}

#[test]
fn a_real_engine_continues_what_another_one_computed_and_releases_what_nobody_wants() {
    let Some(vllm) = Vllm::find() else {
        return;
    };
    for (name, value) in vllm::ENV {
        // SAFETY: there is one test in this program, and no other thread of it runs yet.
        unsafe { std::env::set_var(name, value) };
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(story(&vllm));
}

async fn story(vllm: &Vllm) {
    let ((p, card, prefill), (d, _, decode)) =
        tokio::join!(worker(Role::Prefill, vllm), worker(Role::Decode, vllm));

    let first = computed(&prefill, 5).await;
    assert_eq!(first.finish(), FinishReason::Length);
    assert_eq!(first.kv_lease_ms, Some(3_600_000));
    let fetched = outcome(&decode, &leg(Leg::Decode, 5, &first.kv_transfer_params)).await;
    assert_eq!(fetched.error, None);
    assert_eq!(fetched.tokens[..1], first.tokens);
    assert!(fetched.cached_tokens.expect("the first delta") >= 149);
    let mut local = leg(Leg::Local, 5, &Bytes::new());
    local
        .sampling
        .as_mut()
        .expect("set")
        .skip_reading_prefix_cache = Some(true);
    let local = outcome(&decode, &local).await;
    assert_eq!((local.error, local.cached_tokens), (None, Some(0)));
    assert_eq!(local.tokens, fetched.tokens);

    // Ten prompts that nobody fetches, then a look at what the engine keeps.
    for number in 0..10 {
        let kept = computed(&prefill, 200 + 10 * number).await;
        release(&decode, &kept).await;
    }
    let blocks = 150_f32 / card.model.block_size as f32;
    let one = blocks.ceil() / card.model.kv_blocks as f32;
    let since = Instant::now();
    loop {
        let probe = computed(&prefill, 5).await;
        let usage = prefill.load().kv_usage;
        release(&decode, &probe).await;
        if usage < 2.5 * one {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "{usage} of the blocks are kept");
    }
    // Both engines go on.
    let again = computed(&prefill, 300).await;
    let fetched = outcome(&decode, &leg(Leg::Decode, 300, &again.kv_transfer_params)).await;
    assert_eq!((fetched.error, fetched.tokens.len()), (None, 16));
    for cluster in [p, d] {
        cluster.trigger.drain();
        cluster.ended().await;
    }
}

async fn release(decode: &Client, kept: &Delta) {
    let mut release = leg(Leg::Release, 5, &kept.kv_transfer_params);
    release.prompt_tokens = Bytes::new();
    let released = outcome(decode, &release).await;
    assert_eq!(
        (released.finish(), released.error),
        (FinishReason::Abort, None)
    );
}
