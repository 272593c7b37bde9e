//! A peer written from `proto/README.md` alone, which can do what ours never does.

use async_nats::{Client, Message, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use stator_testkit::nats::NatsServer;

/// Waits until the server has taken in what was sent before.
async fn settle(client: &Client) {
    let echo = client.new_inbox();
    let mut echoes = client.subscribe(echo.clone()).await.unwrap();
    client.publish(echo, Bytes::new()).await.unwrap();
    echoes.next().await.unwrap();
}

/// A worker's end of one pipe.
pub(crate) struct Raw {
    client: Client,
    pub(crate) messages: Option<Subscriber>,
    to: Subject,
}

/// Somebody who takes pipes on a subject.
pub(crate) struct Door {
    client: Client,
    openings: Subscriber,
}

impl Door {
    pub(crate) async fn open(server: &NatsServer, subject: &str) -> Self {
        let client = async_nats::connect(server.url()).await.unwrap();
        let openings = client.subscribe(subject.to_owned()).await.unwrap();
        settle(&client).await;
        Self { client, openings }
    }

    pub(crate) async fn next(&mut self) -> Message {
        self.openings.next().await.unwrap()
    }

    /// Takes the next pipe.
    ///
    /// - `window`: what it says that it takes.
    pub(crate) async fn accept(&mut self, version: u8, window: u32) -> Raw {
        let opening = self.next().await;
        assert_eq!(&opening.payload[..8], b"\x01STATOR\x01");
        let to = opening.reply.unwrap();
        let here = self.client.new_inbox();
        let messages = self.client.subscribe(here.clone()).await.unwrap();
        let mut answer = b"\x02STATOR".to_vec();
        answer.push(version);
        answer.extend(window.to_le_bytes());
        let sent = self
            .client
            .publish_with_reply(to.clone(), here, answer.into());
        sent.await.unwrap();
        Raw {
            client: self.client.clone(),
            messages: Some(messages),
            to,
        }
    }
}

impl Raw {
    pub(crate) async fn send(&self, kind: u8, number: u64, read: u64, data: &[u8]) {
        let mut message = vec![kind];
        message.extend(number.to_le_bytes());
        message.extend(read.to_le_bytes());
        message.extend(data);
        self.send_bytes(message.into()).await;
    }

    pub(crate) async fn send_bytes(&self, message: Bytes) {
        let sent = self.client.publish(self.to.clone(), message).await;
        sent.unwrap();
    }

    /// Stops listening, as when its process is killed.
    pub(crate) async fn vanish(&mut self) {
        self.messages = None;
        settle(&self.client).await;
    }
}
