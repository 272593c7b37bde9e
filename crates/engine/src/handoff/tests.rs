use serde_json::json;

use super::*;

fn handoff(connector: Connector) -> HandOff {
    HandOff {
        connector,
        lease: Duration::from_secs(30),
    }
}

fn msgpack(value: &serde_json::Value) -> Bytes {
    let mut writer = Writer::default();
    writer.json(value);
    writer.bytes.into()
}

fn json_of(bytes: &[u8]) -> serde_json::Value {
    crate::wire::to_json(bytes).expect("msgpack")
}

fn config(line: &str) -> Option<TransferConfig> {
    let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
    TransferConfig::given(&args).expect("readable")
}

fn pulled() -> serde_json::Value {
    json!({"do_remote_prefill": true, "remote_block_ids": [[1, 2]], "remote_engine_id": "e",
           "remote_request_id": "r-00000001", "remote_host": "h", "remote_port": 7,
           "remote_blocks_expiry_time": null, "new_in_some_release": 1})
}

#[test]
fn a_prefill_engine_is_asked_in_its_connectors_own_words() {
    assert_eq!(
        json_of(&handoff(Connector::Nixl).produce("").expect("params")),
        json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
               "remote_block_ids": null, "remote_host": null, "remote_port": null})
    );
    let mooncake = handoff(Connector::Mooncake);
    assert_eq!(
        json_of(&mooncake.produce("t").expect("params"))["transfer_id"],
        "t"
    );
    assert!(matches!(
        mooncake.produce(""),
        Err(HandOffError::NoTransferId(_))
    ));
    let cached = handoff(Connector::LmCacheMp).produce("").expect("params");
    assert_eq!(json_of(&cached), json!({}));
}

#[test]
fn what_a_prefill_engine_answered_passes_byte_for_byte() {
    let params = msgpack(&pulled());
    let passed = handoff(Connector::Nixl).fetch(params.clone(), "ignored");
    assert_eq!(passed, Ok(params));
}

#[test]
fn parameters_that_would_end_the_engine_are_refused_by_key() {
    for (key, value) in [
        ("do_remote_prefill", json!(false)),
        ("remote_block_ids", json!([])),
        ("remote_engine_id", json!(null)),
        ("remote_request_id", json!("")),
        ("remote_host", json!(1)),
        ("remote_port", json!("7")),
    ] {
        let mut params = pulled();
        params[key] = value;
        let refused = handoff(Connector::Nixl).fetch(msgpack(&params), "");
        assert!(
            matches!(&refused, Err(HandOffError::Lacks { key: lacks, .. }) if *lacks == key),
            "{key}: {refused:?}"
        );
        params.as_object_mut().expect("an object").remove(key);
        assert!(
            handoff(Connector::Nixl)
                .fetch(msgpack(&params), "")
                .is_err(),
            "{key}"
        );
    }
    for torn in [&b"\x81"[..], b"\x90", b"\xc1", b""] {
        let refused = handoff(Connector::LmCacheMp).fetch(Bytes::from_static(torn), "");
        assert!(matches!(refused, Err(HandOffError::Params(_))), "{torn:?}");
    }
}

#[test]
fn a_peer_becomes_a_hand_off_by_the_routers_id() {
    let peer = json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_engine_id": "e",
                      "remote_host": "h", "remote_port": 7, "tp_size": 1});
    let push = handoff(Connector::NixlPush);
    let params = push.fetch(msgpack(&peer), "t").expect("params");
    let mut with_id = peer.clone();
    with_id["remote_request_id"] = "t".into();
    assert_eq!(json_of(&params), with_id);
    assert!(matches!(
        push.fetch(msgpack(&peer), ""),
        Err(HandOffError::NoTransferId(_))
    ));
    // What the prefill engine answered names its request itself.
    assert_eq!(push.fetch(params.clone(), "other"), Ok(params));
}

#[test]
fn only_a_time_within_the_lease_counts() {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_secs_f64();
    let left = |expiry: serde_json::Value| {
        let params = msgpack(&json!({"remote_blocks_expiry_time": expiry}));
        handoff(Connector::Nixl).lease_left(&params).as_secs()
    };
    assert!((8..=10).contains(&left(json!(now + 10.0))));
    for other in [json!(null), json!(1234.5), json!(now + 1e6), json!("x")] {
        assert_eq!(left(other), 30);
    }
}

#[test]
fn the_connector_that_hands_on_is_found_however_it_was_written() {
    let nixl = config("--kv-transfer-config={\"kv_connector\":\"NixlPullConnector\"}");
    let found = nixl.expect("given").handoff().expect("hands on");
    assert_eq!(
        (found.connector, found.lease.as_secs()),
        (Connector::Nixl, 30)
    );
    let dotted = "--kv_transfer_config.kv_connector NixlPushConnector \
                  --kv-transfer-config.kv_connector_extra_config.kv_lease_duration 90";
    let found = config(dotted).expect("given").handoff().expect("hands on");
    assert_eq!(
        (found.connector, found.lease.as_secs()),
        (Connector::NixlPush, 90)
    );
    let several = r#"--kv-transfer-config {"kv_connector":"MultiConnector","kv_connector_extra_config":{"connectors":[{"kv_connector":"OffloadingConnector"},{"kv_connector":"LMCacheMPConnector"}]}}"#;
    let several = config(several).expect("given");
    assert_eq!(
        several.connectors(),
        ["OffloadingConnector", "LMCacheMPConnector"]
    );
    assert_eq!(
        several.handoff().expect("hands on").connector,
        Connector::LmCacheMp
    );
    let none = config(r#"--kv-transfer-config {"kv_connector":"OffloadingConnector"}"#);
    assert_eq!(none.expect("given").handoff(), None);
    assert_eq!(config("--max-model-len 64"), None);
}

#[test]
fn short_names_stand_for_what_vllm_calls_them() {
    use ShortName::{Kvbm, Lmcache, Nixl, None as Nothing};
    use stator_common::card::Role;
    let of = |names: &[ShortName], role, cpu| {
        let config = TransferConfig::of_names(names, role, cpu)?;
        serde_json::from_str::<serde_json::Value>(&config.to_json()).ok()
    };
    assert_eq!(
        of(&[Nixl], Role::Prefill, false),
        Some(json!({"kv_connector": "NixlConnector", "kv_role": "kv_producer"}))
    );
    assert_eq!(
        of(&[Nixl], Role::Decode, true),
        Some(
            json!({"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_buffer_device": "cpu"})
        )
    );
    let several = of(&[Kvbm, Nixl], Role::Prefill, false).expect("connectors");
    assert_eq!(several["kv_connector"], "MultiConnector");
    let parts = &several["kv_connector_extra_config"]["connectors"];
    assert_eq!(
        parts[0]["kv_connector_module_path"],
        "kvbm.vllm_integration.connector"
    );
    assert_eq!(parts[1]["kv_connector"], "NixlConnector");
    for (names, role, connector) in [
        (&[Lmcache][..], Role::Agg, "LMCacheConnectorV1"),
        (&[Lmcache], Role::Decode, "LMCacheMPConnector"),
    ] {
        let config = of(names, role, false).expect("a connector");
        assert_eq!(config["kv_connector"], connector);
    }
    let beside = TransferConfig::of_names(&[Lmcache, Nixl], Role::Prefill, false);
    assert_eq!(
        beside
            .expect("connectors")
            .handoff()
            .expect("hands on")
            .connector,
        Connector::Nixl
    );
    assert_eq!(of(&[Nothing], Role::Agg, false), None);
}

#[test]
fn a_peer_is_found_by_what_a_card_says_of_it() {
    let peer = Peer {
        engine_id: "e",
        host: "h",
        port: 7,
        tensor_parallel_size: 2,
        pipeline_parallel_size: 1,
        decode_context_parallel_size: 1,
    };
    assert_eq!(handoff(Connector::Nixl).peer(&peer), None);
    let push = handoff(Connector::NixlPush);
    let params = push
        .fetch(push.peer(&peer).expect("a peer"), "t")
        .expect("params");
    assert_eq!(
        json_of(&params),
        json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_engine_id": "e",
               "remote_host": "h", "remote_port": 7, "tp_size": 2, "pp_size": 1, "dcp_size": 1,
               "remote_request_id": "t"})
    );
    let mooncake = handoff(Connector::Mooncake);
    let params = mooncake
        .fetch(mooncake.peer(&peer).expect("a peer"), "t")
        .expect("params");
    assert_eq!(json_of(&params)["remote_bootstrap_addr"], "http://h:7");
}

#[test]
fn an_id_replaces_the_configuration_that_was_given() {
    let args: Vec<String> = [
        "--kv-transfer-config.kv_connector",
        "NixlPushConnector",
        "-tp",
        "2",
    ]
    .map(String::from)
    .into();
    let given = TransferConfig::given(&args)
        .expect("readable")
        .expect("given");
    assert!(given.has_nixl() && given.engine_id().is_none());
    let args = given.with_engine_id("e").put_into(&args);
    assert_eq!(args[..2], ["-tp", "2"]);
    let read = TransferConfig::given(&args)
        .expect("readable")
        .expect("given");
    assert_eq!(read.engine_id(), Some("e"));
    assert_eq!(
        read.handoff().expect("hands on").connector,
        Connector::NixlPush
    );
}
