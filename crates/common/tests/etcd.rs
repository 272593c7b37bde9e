//! Discovery through real etcd servers, which are killed, restarted and emptied meanwhile.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use stator_common::Code;
use stator_common::card::Relay;
use stator_common::discovery::etcd::{Etcd, TTL};
use stator_common::discovery::{Discovery, Peer};
use stator_common::settings::{EtcdSettings, Secret};
use stator_testkit::etcd::Etcd as Server;
use stator_testkit::wait::{PATIENCE, PAUSE};

use support::{card, gone, next, put};

fn settings(server: &Server) -> EtcdSettings {
    EtcdSettings {
        endpoints: vec![server.url()],
        ..EtcdSettings::default()
    }
}

fn place(server: &Server) -> Etcd {
    Etcd::new(&settings(server)).unwrap()
}

/// Waits until etcd holds this many leases.
async fn wait_leases(server: &Server, count: usize) -> Vec<String> {
    let wait = async {
        loop {
            let answer = server.ask("/v3/lease/leases", &json!({})).await;
            let leases = answer["leases"].as_array().cloned().unwrap_or_default();
            if leases.len() == count {
                let ids = leases
                    .iter()
                    .map(|lease| lease["ID"].as_str().unwrap().to_owned());
                return ids.collect();
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .expect("so many leases")
}

#[tokio::test]
async fn watchers_learn_of_workers_that_were_there_come_and_leave() {
    let Some(server) = Server::start().await else {
        return;
    };
    let first = place(&server).register(card("a")).await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let _second = place(&server).register(card("b")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
    wait_leases(&server, 1).await;
}

#[tokio::test]
async fn processors_are_there_until_they_leave_and_are_no_workers() {
    let Some(server) = Server::start().await else {
        return;
    };
    let peer = |name: &str| Peer {
        name: name.to_owned(),
        host: "here".to_owned(),
        events: Relay {
            endpoint: "tcp://127.0.0.1:1".to_owned(),
            snapshot_endpoint: "tcp://127.0.0.1:2".to_owned(),
        },
    };
    let here = place(&server);
    let mut watch = here.watch().await.unwrap();
    let first = here.join(peer("a")).await.unwrap();
    let _second = place(&server).join(peer("b")).await.unwrap();
    assert_eq!(here.peers().await.unwrap(), [peer("a"), peer("b")]);
    drop(first);
    wait_leases(&server, 1).await;
    assert_eq!(here.peers().await.unwrap(), [peer("b")]);
    let _worker = here.register(card("w")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("w"));
}

#[tokio::test]
async fn other_prefixes_are_other_places() {
    let Some(server) = Server::start().await else {
        return;
    };
    let other = Etcd::new(&EtcdSettings {
        prefix: Some("/other/".to_owned()),
        ..settings(&server)
    });
    let _elsewhere = other.unwrap().register(card("a")).await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    let _here = place(&server).register(card("b")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
}

#[tokio::test]
async fn a_worker_that_dies_is_gone_when_its_lease_is_over() {
    let Some(server) = Server::start().await else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let etcd = place(&server);
    let registered = runtime.spawn(async move { etcd.register(card("a")).await.unwrap() });
    let registration = registered.await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    // Nothing of it runs any more, and it took no leave.
    runtime.shutdown_background();
    std::mem::forget(registration);
    assert_eq!(next(&mut watch).await, gone("a"));
}

#[tokio::test]
async fn a_lost_lease_is_replaced() {
    let Some(server) = Server::start().await else {
        return;
    };
    let _registration = place(&server).register(card("a")).await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let before = wait_leases(&server, 1).await;
    server
        .ask("/v3/lease/revoke", &json!({"ID": before[0]}))
        .await;
    assert_eq!(next(&mut watch).await, gone("a"));
    assert_eq!(next(&mut watch).await, put("a"));
    assert_ne!(wait_leases(&server, 1).await, before);
}

#[tokio::test]
async fn while_etcd_is_away_nothing_changes_and_afterwards_everything_goes_on() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let first = place(&server).register(card("a")).await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    server.kill();
    let silence = tokio::time::timeout(TTL + Duration::from_secs(3), watch.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    server.restart().await;
    let _second = place(&server).register(card("b")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    // Not forgotten: it is there to leave.
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
}

#[tokio::test]
async fn workers_come_back_to_an_etcd_that_lost_everything_before_they_count_as_gone() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let first = place(&server).register(card("a")).await.unwrap();
    let second = place(&server).register(card("b")).await.unwrap();
    let mut watch = place(&server).watch().await.unwrap();
    let there = [next(&mut watch).await, next(&mut watch).await];
    assert_eq!(there, [put("a"), put("b")]);
    server.kill();
    // It leaves while nobody can be told.
    drop(second);
    server.restart_empty().await;
    assert_eq!(next(&mut watch).await, gone("b"));
    drop(first);
    assert_eq!(next(&mut watch).await, gone("a"));
}

#[tokio::test]
async fn history_that_etcd_dropped_is_not_needed() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut watch = place(&server).watch().await.unwrap();
    let _registration = place(&server).register(card("a")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
    let revision = server.ask("/v3/kv/range", &json!({"key": "AA=="})).await;
    let revision = &revision["header"]["revision"];
    server
        .ask(
            "/v3/kv/compaction",
            &json!({"revision": revision, "physical": true}),
        )
        .await;
    let _another = place(&server).register(card("b")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("b"));
    let mut late = place(&server).watch().await.unwrap();
    assert_eq!(
        [next(&mut late).await, next(&mut late).await],
        [put("a"), put("b")]
    );
}

#[tokio::test]
async fn an_etcd_that_asks_for_a_password_gets_it() {
    let Some(server) = Server::start().await else {
        return;
    };
    for (path, body) in [
        (
            "/v3/auth/user/add",
            json!({"name": "root", "password": "right"}),
        ),
        ("/v3/auth/role/add", json!({"name": "root"})),
        (
            "/v3/auth/user/grant",
            json!({"user": "root", "role": "root"}),
        ),
        ("/v3/auth/enable", json!({})),
    ] {
        server.ask(path, &body).await;
    }
    let user = |password: &str| {
        Etcd::new(&EtcdSettings {
            username: Some("root".to_owned()),
            password: Some(Secret::from(password)),
            ..settings(&server)
        })
        .unwrap()
    };
    for refused in [place(&server), user("wrong")] {
        let Err(error) = refused.register(card("a")).await else {
            panic!("registered without the password")
        };
        assert_eq!(error.code(), Code::Unavailable);
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    let mut watch = user("right").watch().await.unwrap();
    let _registration = user("right").register(card("a")).await.unwrap();
    assert_eq!(next(&mut watch).await, put("a"));
}

/// Writes a certificate for `localhost` that vouches for itself, and its key.
fn certify(folder: &Path, name: &str) -> [String; 2] {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    [
        ("cert", made.cert.pem()),
        ("key", made.signing_key.serialize_pem()),
    ]
    .map(|(part, pem)| {
        let path = folder.join(format!("{name}-{part}.pem"));
        std::fs::write(&path, pem).unwrap();
        path.to_str().unwrap().to_owned()
    })
}

#[tokio::test]
async fn an_etcd_behind_tls_is_checked_and_checks_who_comes() {
    let folder = tempfile::tempdir().unwrap();
    let [server_cert, server_key] = certify(folder.path(), "server");
    let [client_cert, client_key] = certify(folder.path(), "client");
    let arguments = [
        "--cert-file",
        &server_cert,
        "--key-file",
        &server_key,
        "--trusted-ca-file",
        &client_cert,
        "--client-cert-auth",
    ];
    let Some(server) = Server::start_tls(&arguments.map(str::to_owned)) else {
        return;
    };
    let shown = EtcdSettings {
        ca_path: Some(server_cert.into()),
        cert_path: Some(client_cert.into()),
        key_path: Some(client_key.into()),
        ..settings(&server)
    };
    let mut watch = Etcd::new(&shown).unwrap().watch().await.unwrap();
    let registered = async {
        loop {
            // It is not waited for: only who may come in could ask.
            match Etcd::new(&shown).unwrap().register(card("a")).await {
                Ok(registration) => return registration,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    };
    let registered = tokio::time::timeout(PATIENCE, registered).await;
    let _registration = registered.expect("registered");
    assert_eq!(next(&mut watch).await, put("a"));
    for (what, strangers) in [
        (
            "trusts nobody",
            EtcdSettings {
                ca_path: None,
                ..shown.clone()
            },
        ),
        (
            "shows nothing",
            EtcdSettings {
                cert_path: None,
                key_path: None,
                ..shown.clone()
            },
        ),
    ] {
        let refused = Etcd::new(&strangers).unwrap().register(card("b")).await;
        assert!(refused.is_err(), "{what}");
    }
}

#[test]
fn half_of_what_goes_together_is_refused() {
    let name = EtcdSettings {
        username: Some("root".to_owned()),
        ..EtcdSettings::default()
    };
    let certificate = EtcdSettings {
        cert_path: Some("c.pem".into()),
        ..EtcdSettings::default()
    };
    let address = EtcdSettings {
        endpoints: vec!["http://a b".to_owned()],
        ..EtcdSettings::default()
    };
    for (settings, said) in [
        (name, "etcd_password_file"),
        (certificate, "etcd_key_path"),
        (address, "a b"),
    ] {
        let error = Etcd::new(&settings).err().unwrap().to_string();
        assert!(error.contains(said), "{error}");
    }
}
