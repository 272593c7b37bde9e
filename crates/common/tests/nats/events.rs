//! News and questions over NATS.

use std::time::Duration;

use bytes::Bytes;
use stator_common::events::{
    nats::{Feed, Outlet, advertised},
    plane::{Feed as _, Heard, Outlet as _, PlaneError},
};
use stator_testkit::{nats::NatsServer, wait::PAUSE};

use crate::{link, name};

async fn pair(server: &NatsServer) -> (Outlet, Feed) {
    let name = name();
    let outlet = Outlet::bind(&link(server), &name).await.unwrap();
    let feed = Feed::connect(&link(server), &advertised(&name), "kv/a/").await;
    (outlet, feed.unwrap())
}

#[tokio::test]
async fn a_subscriber_hears_its_topics_and_gets_answers_larger_than_a_message() {
    let Some(server) = NatsServer::start_with("max_payload: 32768").await else {
        return;
    };
    let (mut outlet, mut feed) = pair(&server).await;
    feed.ask(Bytes::from_static(b"what")).await.unwrap();
    let asked = outlet.asked().await.unwrap();
    assert_eq!(asked.question, &b"what"[..]);
    for answer in [
        Bytes::from(vec![7; 600_000]),
        Bytes::from_static(b"and that"),
    ] {
        outlet.answer(&asked.asker, answer.clone()).await;
        assert_eq!(feed.hear().await.unwrap(), Heard::Answer(answer));
    }
    // A subscription takes its time to arrive.
    let heard = loop {
        outlet.publish("kv/b/0", Bytes::from_static(b"no")).await;
        outlet.publish("kv/a/0", Bytes::from_static(b"yes")).await;
        match tokio::time::timeout(Duration::from_millis(20), feed.hear()).await {
            Ok(heard) => break heard.unwrap(),
            Err(_) => continue,
        }
    };
    assert_eq!(heard, Heard::News(Bytes::from_static(b"yes")));
}

#[tokio::test]
async fn a_publisher_that_is_not_there_and_a_server_that_goes_are_noticed() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    let (mut outlet, mut feed) = pair(&server).await;
    let relay = advertised(&name());
    let mut lonely = Feed::connect(&link(&server), &relay, "kv/a/")
        .await
        .unwrap();
    lonely.ask(Bytes::new()).await.unwrap();
    let error = lonely.hear().await.unwrap_err();
    assert!(
        matches!(&error, PlaneError::Lost { endpoint } if *endpoint == relay.snapshot_endpoint)
    );

    server.kill();
    assert!(matches!(feed.hear().await, Err(PlaneError::Nats(_))));
    // Nobody hears it, and nobody waits.
    outlet.publish("kv/a/0", Bytes::from_static(b"lost")).await;
    server.restart().await;
    // A publisher's subscription comes back by itself.
    let name = name();
    let link = link(&server);
    let mut outlet = Outlet::bind(&link, &name).await.unwrap();
    server.restart().await;
    let asked = loop {
        if let Ok(mut feed) = Feed::connect(&link, &advertised(&name), "kv/a/").await
            && feed.ask(Bytes::from_static(b"still?")).await.is_ok()
            && let Ok(asked) = tokio::time::timeout(Duration::from_millis(20), outlet.asked()).await
        {
            break asked.unwrap();
        }
        tokio::time::sleep(PAUSE).await;
    };
    assert_eq!(asked.question, &b"still?"[..]);
}
