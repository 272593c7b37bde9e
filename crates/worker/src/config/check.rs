//! What of a configuration goes together.

use stator_common::card::{self, Role};
use stator_engine::flags::Given;

use super::{Config, ConfigError};
use crate::{
    adapters,
    cli::{EngineKind, EventPlane, RequestPlane},
    launch,
};

/// Refuses what does not.
///
/// # Errors
/// [`ConfigError`].
pub(super) fn check(config: &Config, role: Role) -> Result<(), ConfigError> {
    if config.model.is_empty() {
        return Err(ConfigError::NoModel);
    }
    check_role(config, role)?;
    adapters::read(&config.engine_args, &config.names())?;
    config.transfer(role)?;
    config.handoff(role)?;
    if config.request_plane == RequestPlane::Nats
        && !config.nats.is_closed()
        && config.plane_token.is_none()
        && !config.insecure_plane
    {
        return Err(ConfigError::OpenNats(config.nats.servers().join(",")));
    }
    let tls = &config.request_plane_tls;
    if config.request_plane == RequestPlane::Nats && !tls.is_empty() {
        return Err(ConfigError::TlsOverNats);
    }
    if tls.ca.is_some() && tls.cert.is_none() && tls.key.is_none() {
        return Err(ConfigError::ClientsWithoutTls);
    }
    config.kv_events()?;
    if config.event_plane() == EventPlane::Nats && config.kv_relay_port != 0 {
        return Err(ConfigError::RelayPortOverNats(config.kv_relay_port));
    }
    if let Some(address) = &config.kv_relay_address {
        let read = launch::address(address);
        read.map_err(|_| ConfigError::RelayAddress(address.clone()))?;
    }
    if config.headless {
        check_headless(config)?;
    }
    if config.engine_keep && launch::steps_together(config) {
        return Err(ConfigError::KeepLockstep);
    }
    let place = config.place(role);
    for name in [place.namespace, place.component, place.endpoint] {
        if !card::is_name(&name) {
            return Err(ConfigError::Name(name));
        }
    }
    match (config.engine_kind(), &config.engine_attach) {
        (EngineKind::Vllm, Some(_)) => Err(ConfigError::Attach("vllm")),
        (EngineKind::Sim, Some(_)) => Err(ConfigError::Attach("sim")),
        (EngineKind::Attach, None) => Err(ConfigError::NoAttach),
        (EngineKind::Attach, Some(_)) | (EngineKind::Vllm | EngineKind::Sim, None) => Ok(()),
    }
}

/// Refuses flags that mean another kind of worker than this program is.
fn check_role(config: &Config, role: Role) -> Result<(), ConfigError> {
    let meant = [
        config
            .disaggregation_mode
            .map(|mode| ("--disaggregation-mode", mode.role())),
        config
            .is_prefill_worker
            .then_some(("--is-prefill-worker", Role::Prefill)),
        config
            .is_decode_worker
            .then_some(("--is-decode-worker", Role::Decode)),
    ];
    match meant
        .into_iter()
        .flatten()
        .find(|(_, meant)| *meant != role)
    {
        Some((flag, Role::Encode)) => Err(ConfigError::NoEncode(flag)),
        Some((flag, meant)) => Err(ConfigError::OtherRole { flag, meant, role }),
        None => Ok(()),
    }
}

/// Refuses what a further node of an engine has no use for, or cannot be.
fn check_headless(config: &Config) -> Result<(), ConfigError> {
    let given = Given::read(&config.engine_args);
    let number = |name| given.value(name).and_then(|text| text.parse::<u32>().ok());
    let why = if config.engine_kind() != EngineKind::Vllm {
        "it runs vLLM, and --engine names another"
    } else if config.engine_keep {
        "it has nothing that a later worker could take over: leave out --engine-keep"
    } else if config.data_parallel_size > 1 {
        "each engine has its own nodes: leave out --data-parallel-size and start one for each engine"
    } else if number("nnodes").unwrap_or(1) < 2 || number("node-rank").unwrap_or(0) == 0 {
        "say which node of which engine it is: --nnodes N --node-rank R --master-addr HOST, R at least 1 \
         (node 0 is started without --headless)"
    } else {
        return Ok(());
    };
    Err(ConfigError::Headless(why))
}

#[cfg(test)]
mod tests {
    use super::{super::load::tests::loaded, *};
    use crate::cli::{EventPlane, KvRelay};

    #[test]
    fn a_role_without_a_hand_off_is_told_the_flag_that_works() {
        let config = |line: &str| loaded(line, &[]).unwrap();
        for (line, remedy) in [
            (
                "stator-agg /m --engine sim",
                "engine to engine: say --connector nixl",
            ),
            (
                "stator-agg /m --engine sim --connector kvbm",
                "and DynamoConnector does not: say --connector kvbm,nixl",
            ),
            (
                "stator-agg /m --engine sim --connector none",
                "say --connector nixl",
            ),
            (
                "stator-agg /m --engine sim --kv-transfer-config.kv_connector OffloadingConnector",
                "and OffloadingConnector does not: say --connector nixl",
            ),
        ] {
            let error = config(line).handoff(Role::Decode).unwrap_err().to_string();
            assert!(error.contains(remedy), "{error}");
            assert!(config(line).handoff(Role::Agg).unwrap().is_none());
        }
        let both = "stator-agg /m --engine sim --connector nixl --kv-transfer-config {\"kv_connector\":\"X\"}";
        let error = loaded(both, &[]).unwrap_err().to_string();
        assert!(error.contains("--kv-transfer-config '{"), "{error}");
        let error = loaded("stator-agg /m --engine sim --connector none,nixl", &[]);
        assert!(matches!(error, Err(ConfigError::NoneAndOthers(_))));
    }

    #[test]
    fn a_flag_that_means_another_kind_of_worker_names_its_program() {
        let role = |line: &str, variables: &[(&str, &str)]| loaded(line, variables);
        for (line, program) in [
            (
                "stator-agg /m --engine sim --is-prefill-worker",
                "run stator-prefill",
            ),
            (
                "stator-agg /m --engine sim --is-decode-worker",
                "run stator-decode",
            ),
            (
                "stator-agg /m --engine sim --disaggregation-mode decode",
                "run stator-decode",
            ),
            (
                "stator-agg /m --engine sim --disaggregation-mode encode",
                "does not have",
            ),
        ] {
            let error = role(line, &[]).unwrap_err().to_string();
            assert!(error.contains(program), "{error}");
        }
        let plain = "stator-agg /m --engine sim";
        for name in ["DYN_DISAGGREGATION_MODE", "DYN_VLLM_DISAGGREGATION_MODE"] {
            assert!(role(plain, &[(name, "prefill")]).is_err(), "{name}");
        }
        for mode in ["agg", "pd"] {
            assert!(role(plain, &[("DYN_VLLM_DISAGGREGATION_MODE", mode)]).is_ok());
        }
    }

    #[test]
    fn a_headless_node_says_which_node_it_is() {
        let config = |line: &str| {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            Config {
                model: "/m".to_owned(),
                headless: true,
                engine_args: args,
                ..Config::default()
            }
        };
        let node = "--nnodes 2 --node-rank 1 --master-addr h";
        assert!(check(&config(node), Role::Agg).is_ok());
        for line in ["", "--nnodes 2 --node-rank 0", "--node-rank 1"] {
            let error = check(&config(line), Role::Agg).unwrap_err().to_string();
            assert!(error.contains("--node-rank R"), "{error}");
        }
        let kept = Config {
            engine_keep: true,
            ..config(node)
        };
        assert!(check(&kept, Role::Agg).is_err());
    }

    #[test]
    fn a_relay_that_could_hear_nothing_is_refused() {
        let relay = "stator-agg /m --engine sim --kv-relay embedded";
        for given in [
            "--kv-events-config {\"enable_kv_cache_events\":false}",
            "--kv-events-config {\"enable_kv_cache_events\":true,\"endpoint\":\"tcp://h:1\"}",
            "--kv-relay-address nowhere",
        ] {
            let error = loaded(&format!("{relay} {given}"), &[]).unwrap_err();
            assert!(error.to_string().contains("--kv-"), "{error}");
        }
        let named = loaded(relay, &[("DYN_VLLM_KV_EVENT_PORT", "7000")]).unwrap();
        assert_eq!(
            (named.kv_relay, named.kv_event_port),
            (KvRelay::Embedded, Some(7000))
        );
        let off = "stator-agg /m --engine sim --enable-kv-events --kv-events-publisher-type zmq";
        assert!(loaded(off, &[]).unwrap().enable_kv_events);
        assert_eq!(named.event_plane(), EventPlane::Zmq);
        for flag in ["--event-plane", "--kv-events-publisher-type"] {
            let over = loaded(&format!("{relay} {flag} nats"), &[]).unwrap();
            assert_eq!(over.event_plane(), EventPlane::Nats);
        }
        let nowhere = format!("{relay} --event-plane nats --kv-relay-port 5600");
        let refused = loaded(&nowhere, &[]).unwrap_err().to_string();
        assert!(refused.contains("--event-plane zmq"), "{refused}");
    }

    #[test]
    fn what_is_left_of_nats_in_the_environment_counts_only_where_it_is_used() {
        let left = [("NATS_AUTH_USERNAME", "u"), ("NATS_SERVER", "http://h")];
        let line = "stator-agg /m --engine sim";
        assert!(loaded(line, &left).is_ok());
        for plane in ["--request-plane nats", "--event-plane nats"] {
            let refused = loaded(&format!("{line} {plane}"), &left).unwrap_err();
            assert!(refused.to_string().contains("--nats-server"), "{refused}");
        }
    }

    #[test]
    fn a_nats_server_of_others_wants_a_login_or_a_token() {
        let line = "stator-agg /m --engine sim --request-plane nats";
        assert!(loaded(line, &[]).is_ok());
        let set = ("NATS_SERVER", "nats://nats.prod:4222");
        let error = loaded(line, &[set]).unwrap_err().to_string();
        assert!(error.contains("--plane-token-file"), "{error}");
        for secret in ["STATOR_PLANE_TOKEN", "NATS_AUTH_TOKEN"] {
            let config = loaded(line, &[set, (secret, "s3cret")]).unwrap();
            assert!(!format!("{config:?}").contains("s3cret"));
        }
        assert!(loaded("stator-agg /m --engine sim", &[set]).is_ok());
    }

    #[test]
    fn the_request_plane_is_chosen_and_its_certificates_go_together() {
        let sim = "stator-agg /m --engine sim";
        let http = loaded(&format!("{sim} --request-plane http"), &[]).unwrap();
        assert_eq!(http.request_plane, RequestPlane::Http);
        let named = [
            ("DYN_REQUEST_PLANE", "http"),
            ("STATOR_REQUEST_PLANE_TLS_CERT", "/c"),
            ("STATOR_REQUEST_PLANE_TLS_KEY", "/k"),
        ];
        let named = loaded(sim, &named).unwrap();
        assert_eq!(named.request_plane, RequestPlane::Http);
        assert_eq!(named.request_plane_tls.cert, Some("/c".into()));
        for (given, flag) in [
            (
                "--request-plane nats --request-plane-tls-ca /ca",
                "--nats-tls-ca-cert-path",
            ),
            ("--request-plane-tls-ca /ca", "--request-plane-tls-cert"),
        ] {
            let error = loaded(&format!("{sim} {given}"), &[]).unwrap_err();
            assert!(error.to_string().contains(flag), "{error}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "stator-agg --engine sim",
            "stator-agg /m --engine sim --engine-attach tcp://127.0.0.1:1",
            "stator-agg /m --engine attach",
            "stator-agg /m --engine sim --namespace a/b",
        ] {
            assert!(loaded(line, &[]).is_err(), "{line}");
        }
    }
}
