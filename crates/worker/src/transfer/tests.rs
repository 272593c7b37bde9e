use std::net::Ipv4Addr;

use super::*;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn config(connector: &str) -> Config {
    Config {
        engine_args: vec![
            "--kv-transfer-config".to_owned(),
            format!("{{\"kv_connector\":\"{connector}\",\"kv_role\":\"kv_both\"}}"),
            "-tp".to_owned(),
            "2".to_owned(),
        ],
        ..Config::default()
    }
}

fn transfer(config: &Config, ranks: usize, environment: &[(&str, &str)]) -> Transfer {
    let folder = tempfile::tempdir().unwrap();
    let run_dirs: Vec<PathBuf> = (0..ranks)
        .map(|rank| folder.path().join(rank.to_string()))
        .collect();
    let environment = |name: &str| {
        let found = environment.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    Transfer::new(config, Role::Prefill, HERE, &run_dirs, &environment).unwrap()
}

#[test]
fn every_rank_has_a_side_channel_of_its_own_and_the_environment_counts() {
    let config = config("NixlConnector");
    let chosen = transfer(&config, 2, &[]);
    assert_ne!(chosen.sides[0].port, chosen.sides[1].port);
    assert!(chosen.sides.iter().all(|side| side.port < 32_768));
    let env = chosen.env(0);
    assert!(env.contains(&(HOST.into(), "127.0.0.1".into())), "{env:?}");
    let named = transfer(&config, 2, &[(PORT, "7000"), (HOST, "10.0.0.1")]);
    let places: Vec<_> = named
        .sides
        .iter()
        .map(|side| (&side.host[..], side.port))
        .collect();
    assert_eq!(places, [("10.0.0.1", 7000), ("10.0.0.1", 7001)]);
    // What was given stays as it is.
    assert_eq!(
        named.args(config.engine_args.clone(), 0),
        config.engine_args
    );
    assert!(named.card(&config.engine_args).unwrap().peers.is_empty());
}

#[test]
fn an_engine_that_pushes_gets_an_id_that_its_card_says() {
    let config = config("NixlPushConnector");
    let transfer = transfer(&config, 2, &[]);
    let args = transfer.args(config.engine_args.clone(), 1);
    let given = TransferConfig::given(&args).unwrap().unwrap();
    assert_eq!(given.engine_id(), transfer.sides[1].engine_id.as_deref());
    let card = transfer.card(&args).unwrap();
    assert_eq!((card.peers.len(), card.tensor_parallel_size), (2, 2));
    assert_ne!(card.peers[0], card.peers[1]);
    let id: String = given
        .engine_id()
        .unwrap()
        .bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(card.peers[1].contains(&id));
}

#[test]
fn ranks_that_step_together_are_told_what_their_own_follows_from() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"num_experts": 4}"#).unwrap();
    let config = Config {
        model: folder.path().display().to_string(),
        data_parallel_size: 3,
        ..config("NixlPushConnector")
    };
    let transfer = transfer(&config, 3, &[]);
    let told = |rank| {
        let args = transfer.args(config.engine_args.clone(), rank);
        let given = TransferConfig::given(&args).unwrap().unwrap();
        let env = transfer.env(rank);
        let port = env.iter().find(|(name, _)| name == PORT).unwrap();
        let port: u16 = port.1.to_str().unwrap().parse().unwrap();
        (given.engine_id().unwrap().to_owned(), port)
    };
    let (id, port) = told(0);
    for rank in 0..3 {
        assert_eq!(told(rank), (id.clone(), port));
        let side = &transfer.sides[rank];
        let own = format!("{id}_dp{rank}");
        assert_eq!(side.engine_id.as_deref(), Some(&own[..]));
        assert_eq!(usize::from(side.port), usize::from(port) + rank);
    }
}

#[test]
fn all_nodes_of_an_engine_have_one_id() {
    let node = |rank: &str, id: &str| {
        let mut config = config("NixlConnector");
        config.engine_args[1].insert_str(1, id);
        let flags = ["--nnodes", "2", "--master-addr", "h", "--node-rank", rank];
        config.engine_args.extend(flags.map(str::to_owned));
        config
    };
    let id = |args: &[String]| {
        let given = TransferConfig::given(args).unwrap().unwrap();
        given.engine_id().map(str::to_owned)
    };
    let (first, second) = (node("0", ""), node("1", ""));
    let first = transfer(&first, 1, &[]).args(first.engine_args, 0);
    let second = node_args(&second, Role::Prefill).unwrap();
    assert!(id(&first).is_some());
    assert_eq!(id(&first), id(&second));
    let named = node("1", "\"engine_id\":\"e\",");
    let named = node_args(&named, Role::Prefill).unwrap();
    assert_eq!(id(&named).as_deref(), Some("e"));
}

#[test]
fn a_kept_engine_is_found_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let run_dirs = [folder.path().to_owned()];
    let config = Config {
        engine_keep: true,
        ..config("NixlPushConnector")
    };
    let new = || {
        let transfer = Transfer::new(&config, Role::Prefill, HERE, &run_dirs, &|_| None);
        transfer.unwrap().sides
    };
    assert_eq!(new(), new());
}

#[test]
fn an_engine_elsewhere_has_to_be_told_of_unless_it_says_itself_where_it_is() {
    let laid_out = |connector| {
        let config = Config {
            engine_attach: Some("tcp://127.0.0.1:1".to_owned()),
            ..config(connector)
        };
        Transfer::new(&config, Role::Prefill, HERE, &["x".into()], &|_| None)
    };
    let refused = laid_out("MooncakeConnector");
    assert!(matches!(refused, Err(TransferError::Elsewhere { .. })));
    let pushes = laid_out("NixlPushConnector").unwrap();
    assert!(pushes.sides.is_empty());
    assert!(pushes.card(&[]).unwrap().peers.is_empty());
}

#[test]
fn on_a_cpu_engines_with_nixl_are_bound_to_no_cores_unless_the_environment_says_so() {
    let mut config = config("NixlConnector");
    assert!(!transfer(&config, 1, &[]).env(0).contains(&pair(UNBOUND)));
    let installed = serde_json::json!({
        "vllm_version": "0.32.0", "structs": {}, "flags": [], "packages": {"vllm": "0.32.0+cpu"}, "modules": [],
    });
    config.vllm = Some(serde_json::from_value(installed).unwrap());
    let env = transfer(&config, 1, &[]).env(0);
    assert!(
        env.contains(&pair(UNBOUND)) && env.contains(&pair(UCX_TLS)),
        "{env:?}"
    );
    let env = transfer(&config, 1, &[(UNBOUND.0, "0-3")]).env(0);
    assert!(!env.iter().any(|(name, _)| name == UNBOUND.0), "{env:?}");
}

fn pair((name, value): (&str, &str)) -> (OsString, OsString) {
    (name.into(), value.into())
}
