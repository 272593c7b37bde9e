//! The KV cache as others see it: events, and hand-off from engine to engine.

use super::*;

#[tokio::test]
async fn kv_events_tell_what_is_cached_and_are_told_again() {
    let events = "--num-gpu-blocks-override 65 --kv-events-config \
        {\"enable_kv_cache_events\":true,\"endpoint\":\"tcp://*:0\",\"replay_endpoint\":\"tcp://*:0\"}";
    let (mut frontend, _engine) = start(events).await;
    let ready = frontend.ready.clone();
    let mut subscriber = Subscriber::connect(&ready).await;
    let prompt: Vec<u32> = (10..30).collect();
    // A subscription takes its time to arrive; the first batch is fetched again.
    frontend.add("a", &prompt, 12, &[]).await;
    frontend.finish("a").await;
    frontend.call("reset_prefix_cache", vec![]).await.unwrap();
    frontend.add("b", &prompt, 1, &[]).await;
    assert_eq!(
        frontend.finish("b").await.prefill("num_cached_tokens"),
        Some(0)
    );
    frontend.add("c", &prompt, 1, &[]).await;
    assert_eq!(
        frontend.finish("c").await.prefill("num_cached_tokens"),
        Some(16)
    );

    let batches = subscriber.replay(0).await;
    let all: Vec<&Value> = batches.iter().flat_map(|(_, events)| events).collect();
    let kind = |event: &Value| event.get("type").unwrap().as_str().unwrap().to_owned();
    let kinds: Vec<String> = all.iter().map(|event| kind(event)).collect();
    assert_eq!(
        kinds,
        [
            "BlockStored",
            "BlockStored",
            "AllBlocksCleared",
            "BlockStored"
        ]
    );
    let hashes = |event: &Value| {
        event
            .get("block_hashes")
            .unwrap()
            .as_array()
            .unwrap()
            .to_vec()
    };
    assert_eq!(hashes(all[0]).len(), 2);
    assert_eq!(
        all[0].get("token_ids"),
        Some(&Value::from(prompt[..16].to_vec()))
    );
    assert_eq!(all[0].get("parent_block_hash"), None);
    assert_eq!(all[1].get("parent_block_hash"), Some(&hashes(all[0])[1]));
    assert_eq!(all[0].get("block_size"), Some(&Value::Int(8)));
    assert_eq!(hashes(all[3]), hashes(all[0]));
    let numbers: Vec<u64> = batches.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(numbers, (0..batches.len() as u64).collect::<Vec<_>>());
    assert_eq!(subscriber.replay(2).await.len(), batches.len() - 2);

    let other: Vec<u32> = (30..60).collect();
    frontend.add("d", &other, 1, &[]).await;
    while subscriber.next().await.0 != batches.len() as u64 {}
}

const NIXL: &str =
    "--kv-transfer-config {\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\"}";

fn transfer(params: Value) -> (&'static str, Value) {
    ("extra_args", Value::map([("kv_transfer_params", params)]))
}

fn produce() -> (&'static str, Value) {
    transfer(Value::map([
        ("do_remote_decode", Value::Bool(true)),
        ("do_remote_prefill", Value::Bool(false)),
    ]))
}

#[tokio::test]
async fn a_prompt_prefilled_in_one_engine_is_decoded_in_another() {
    let (mut prefill, _p) = start(NIXL).await;
    let (mut decode, _d) = start(NIXL).await;
    let prompt: Vec<u32> = (4..24).collect();
    prefill.add("p", &prompt, 1, &[produce()]).await;
    let first = prefill.finish("p").await;
    let params = first.kv_transfer_params().unwrap();
    assert_eq!(params.get("do_remote_prefill"), Some(&Value::Bool(true)));
    assert_eq!(params.get("remote_num_tokens"), Some(&Value::Int(20)));
    // Kept blocks are in use.
    assert_eq!(
        prefill.call("reset_prefix_cache", vec![]).await,
        Ok(Value::Bool(false))
    );

    decode
        .add("d", &prompt, 6, &[transfer(params.clone())])
        .await;
    let answer = decode.finish("d").await;
    assert_eq!(answer.tokens, expected(&prompt, 6));
    assert_eq!(answer.tokens[0], first.tokens[0]);
    assert_eq!(answer.prefill("num_external_cached_tokens"), Some(20));
    assert_eq!(answer.prefill("num_computed_tokens"), Some(0));
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::task::yield_now().await;
    }

    // It can be fetched once.
    decode
        .add("again", &prompt[..10], 6, &[transfer(params)])
        .await;
    tokio::time::pause();
    let again = decode.finish("again").await;
    assert_eq!((again.tokens.len(), again.finish), (0, Some(3)));
}

#[tokio::test]
async fn kv_that_nobody_fetches_is_given_back_and_then_unknown() {
    let (mut prefill, _p) = start(&format!("{NIXL} --sim-kv-lease-ms 1")).await;
    let (mut decode, _d) = start(&format!("{NIXL} --sim-kv-failure-ms 1")).await;
    prefill.add("p", &[10, 11], 1, &[produce()]).await;
    let params = prefill.finish("p").await.kv_transfer_params().unwrap();
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    decode.add("d", &[10, 11], 6, &[transfer(params)]).await;
    assert_eq!(decode.finish("d").await.finish, Some(3));
}

#[tokio::test]
async fn kv_of_a_refused_request_is_freed_by_an_add_that_aborts_at_once() {
    let (mut prefill, _p) = start(NIXL).await;
    let (mut decode, _d) = start(NIXL).await;
    prefill.add("p", &[10, 11], 1, &[produce()]).await;
    let params = prefill.finish("p").await.kv_transfer_params().unwrap();
    let mut fields = add_fields("d", &[0], 1, &[transfer(params)]);
    fields.resize(19, Value::Nil);
    fields.push(Value::Bool(true));
    decode.send(0, Value::Array(fields).to_vec()).await;
    while prefill.call("reset_prefix_cache", vec![]).await != Ok(Value::Bool(true)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
