//! A topology whose requests and news of caches go over a real NATS server.

use std::time::Duration;

use stator_testkit::{nats::NatsServer, wait::PAUSE};

use crate::launcher::{Launcher, SLOW, chat, endless};

#[tokio::test]
async fn requests_and_caches_go_over_nats_and_go_on_when_its_server_starts_again() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    let shape = format!(
        "--workers 2 --router kv --request-plane nats --event-plane nats --nats-server {}",
        server.url()
    );
    let launcher = Launcher::ready(&shape, SLOW).await;
    assert_eq!(launcher.ask(&chat(5)).await.status, 200);
    let workers = launcher.workers().await;
    for target in &workers {
        let address = target["address"].as_str().expect("an address");
        assert!(address.starts_with("nats://stator.plane."), "{address}");
    }
    launcher.until_caches_are_known().await;

    // It runs when the server goes: told by an error event, since tokens were sent.
    let request = endless();
    let running = launcher.ask(&request);
    let broken = async {
        launcher.until_running().await;
        server.kill();
        server
    };
    let (answered, mut server) = tokio::join!(running, broken);
    assert!(answered.text().contains("\"error\""), "{}", answered.text());
    let refused = launcher.ask(&chat(5)).await;
    assert_eq!(refused.status, 503, "{}", refused.text());

    server.restart().await;
    while launcher.ask(&chat(5)).await.status != 200 {
        tokio::time::sleep(PAUSE).await;
    }
    launcher.until_caches_are_known().await;
}

#[tokio::test]
async fn a_topology_without_its_nats_server_says_which_flag_names_it() {
    let port = stator_testkit::ports::free();
    let shape = format!("--request-plane nats --nats-server nats://127.0.0.1:{port}");
    let mut launcher = Launcher::start(stator_testkit::ports::free(), &shape, "");
    let ended = tokio::time::timeout(Duration::from_secs(60), launcher.ended()).await;
    let (status, printed) = ended.expect("it ends");
    assert_eq!(status.code(), Some(1), "{printed}");
    assert!(printed.contains("--nats-server"), "{printed}");
}

#[tokio::test]
async fn prompts_wait_in_a_line_that_the_server_holds() {
    let Some(server) = NatsServer::start_with_jetstream().await else {
        return;
    };
    let shape = format!(
        "--prefill-workers 2 --decode-workers 1 --prefill-dispatch queue --request-plane nats --nats-server {}",
        server.url()
    );
    let launcher = Launcher::ready(&shape, "").await;
    while !launcher.is_shared().await {
        tokio::time::sleep(PAUSE).await;
    }
    assert_eq!(launcher.ask(&chat(5)).await.status, 200);
}
