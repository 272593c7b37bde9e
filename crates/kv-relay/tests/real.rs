//! From a real vLLM over a relay to a follower. Fails where there is no vLLM; `testkit::vllm` says how it is found.

mod support;

use stator_common::nats::Nats;
use stator_engine::{Config, Engine, Launch, Spawn, Waits, kv_events::Publisher};
use stator_testkit::{
    ports,
    vllm::{self, Vllm},
    wait::PATIENCE,
};
use support::{Known, compute, names, on_port, outputs, relay, said};

/// Tokens in a block (`testkit::vllm::FLAGS`).
const BLOCK: usize = 32;

/// Just enough for the longest request, so that a few prompts fill it.
const BLOCKS: &str = "--num-gpu-blocks-override=72";

#[tokio::test]
async fn a_follower_knows_what_a_real_engine_holds_through_resets_and_relays() {
    let Some(vllm) = Vllm::find() else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let run_dir = folder.path().join("engine");
    let publisher = Publisher::in_files(run_dir.to_str().expect("UTF-8"));
    let own = |(key, value): (&str, &str)| (key.into(), value.into());
    let flags: Vec<String> = vllm::flags().chain([BLOCKS.to_owned()]).collect();
    let spawn = Spawn {
        python: vllm.python.clone(),
        model: vllm.model.display().to_string(),
        args: publisher.put_into(&flags),
        env: vllm::ENV.map(own).to_vec(),
    };
    let config = Config {
        launch: Launch::Spawn(spawn),
        run_dir,
        keep: false,
        dp_rank: 0,
        lockstep: None,
        vocab_size: None,
        adapters: Vec::new(),
        any_version: false,
        waits: Waits {
            ready: PATIENCE,
            ..Waits::default()
        },
    };
    let (sink, mut outputs) = outputs();
    let engine = Engine::start(config, sink).await.expect("vLLM starts");
    let resolved = engine.info().kv_events.clone();
    let endpoints = publisher.endpoints(resolved.as_ref(), 0, "127.0.0.1");
    assert_eq!(endpoints, publisher.endpoints(None, 0, "127.0.0.1"));

    let place = on_port(ports::free_row(2));
    let first = relay(&place, &endpoints).await;
    let mut known = Known::follow(&first, Nats::default());
    compute(&engine, &mut outputs, 190..390).await;
    known.until(&names(190..390, BLOCK)).await;
    // More than the cache holds: blocks go as others come.
    for start in 1..=12 {
        compute(&engine, &mut outputs, start..start + 350).await;
    }
    let held = said(&endpoints, 13).await;
    assert!(held.len() > 60 && held.is_disjoint(&names(190..390, BLOCK)));
    known.until(&held).await;

    // The relay is killed in the middle, and another one knows it all again.
    drop(first);
    compute(&engine, &mut outputs, 20..370).await;
    let _second = relay(&place, &endpoints).await;
    compute(&engine, &mut outputs, 21..371).await;
    known.until(&said(&endpoints, 15).await).await;
    known.resynced().await;
    known.until(&said(&endpoints, 15).await).await;

    // What an idle engine forgets, it tells with its next step.
    let reset = engine.utility("reset_prefix_cache", &[]).await;
    assert_eq!(reset.expect("answered"), serde_json::json!(true));
    compute(&engine, &mut outputs, 30..230).await;
    known.until(&names(30..230, BLOCK)).await;

    // What that step computes anew is not lost with the rest.
    compute(&engine, &mut outputs, 40..240).await;
    let both = &names(30..230, BLOCK) | &names(40..240, BLOCK);
    known.until(&both).await;
    let reset = engine.utility("reset_prefix_cache", &[]).await;
    assert_eq!(reset.expect("answered"), serde_json::json!(true));
    compute(&engine, &mut outputs, 30..230).await;
    known.until(&names(30..230, BLOCK)).await;

    // And when it ends, nothing is known.
    engine.shutdown().await;
    known.until_lost().await;
}
