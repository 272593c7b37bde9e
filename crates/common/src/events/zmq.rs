//! News by ZMQ: a PUB socket that everybody subscribes to, and a ROUTER beside it that answers questions.
//!
//! The library keeps up to 100,000 messages for a subscriber that does not read, and drops what comes then; nothing
//! waits for it. A lost connection is an error here: whoever hears connects again, and knows that it missed something.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, channel::mpsc};
use zeromq::{
    DealerSocket, Endpoint, PubSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket,
    SocketEvent, SocketOptions, SocketRecv, SocketSend, SubSocket, ZmqMessage,
};

use super::plane::{self, Asker, Heard, PlaneError, Question};
use crate::card::Relay;

/// How long a connection may take, greetings included.
const CONNECT: Duration = Duration::from_secs(3);

/// A publisher on two ports.
pub struct Outlet {
    publish: PubSocket,
    answers: RouterSendHalf,
    questions: RouterRecvHalf,
    ports: Ports,
}

/// Where a publisher is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    pub news: SocketAddr,
    /// Where questions come.
    pub questions: SocketAddr,
}

impl Ports {
    /// Returns where subscribers find this.
    ///
    /// - `host`: under which they reach this machine.
    pub fn advertised(self, host: &str) -> Relay {
        let join = |port| match host.contains(':') && !host.starts_with('[') {
            true => format!("tcp://[{host}]:{port}"),
            false => format!("tcp://{host}:{port}"),
        };
        Relay {
            endpoint: join(self.news.port()),
            snapshot_endpoint: join(self.questions.port()),
        }
    }
}

impl Outlet {
    /// Binds both ports.
    ///
    /// - `port`: of the news; questions come on the next one. 0: two free ones.
    ///
    /// # Errors
    /// [`PlaneError::Listen`].
    pub async fn bind(host: IpAddr, port: u16) -> Result<Self, PlaneError> {
        let mut publish = PubSocket::new();
        let news = bind(&mut publish, SocketAddr::new(host, port)).await?;
        let mut router = RouterSocket::new();
        // The port after the last one is none: a free one.
        let next = if port == 0 { 0 } else { port.wrapping_add(1) };
        let asked = bind(&mut router, SocketAddr::new(host, next)).await?;
        let (answers, questions) = router.split();
        Ok(Self {
            publish,
            answers,
            questions,
            ports: Ports {
                news,
                questions: asked,
            },
        })
    }

    /// Returns where it is bound.
    pub fn ports(&self) -> Ports {
        self.ports
    }
}

async fn bind(socket: &mut impl Socket, addr: SocketAddr) -> Result<SocketAddr, PlaneError> {
    let endpoint = format!("tcp://{addr}");
    match socket.bind(&endpoint).await {
        Ok(Endpoint::Tcp(_, port)) => Ok(SocketAddr::new(addr.ip(), port)),
        Ok(_) => Ok(addr),
        Err(source) => Err(PlaneError::Listen {
            endpoint,
            source: Box::new(source),
        }),
    }
}

#[async_trait]
impl plane::Outlet for Outlet {
    async fn publish(&mut self, topic: &str, news: Bytes) {
        let mut message = ZmqMessage::from(news);
        message.push_front(Bytes::copy_from_slice(topic.as_bytes()));
        // It fails for no reason that a publisher could do something about.
        let _ = self.publish.send(message).await;
    }

    async fn asked(&mut self) -> Result<Question, PlaneError> {
        loop {
            let Ok(message) = self.questions.recv().await else {
                return Err(PlaneError::Lost {
                    endpoint: format!("tcp://{}", self.ports.questions),
                });
            };
            // Anything else is not from one of us.
            if let Ok([asker, question]) = <[Bytes; 2]>::try_from(message.into_vec()) {
                return Ok(Question {
                    asker: Asker(asker),
                    question,
                });
            }
        }
    }

    async fn answer(&mut self, asker: &Asker, answer: Bytes) {
        let mut message = ZmqMessage::from(answer);
        message.push_front(asker.0.clone());
        // Whoever asked may have gone.
        let _ = self.answers.send(message).await;
    }
}

/// A subscriber's two connections.
pub struct Feed {
    relay: Relay,
    news: SubSocket,
    news_events: mpsc::Receiver<SocketEvent>,
    questions: DealerSocket,
    question_events: mpsc::Receiver<SocketEvent>,
}

impl Feed {
    /// Connects, and subscribes to the topics that begin with `topics`.
    ///
    /// # Errors
    /// [`PlaneError::Connect`].
    pub async fn connect(relay: &Relay, topics: &str) -> Result<Self, PlaneError> {
        let mut news = SubSocket::with_options(options());
        // Before the connection, so that it is the first thing that the publisher hears.
        let subscribed = news.subscribe(topics).await;
        subscribed.map_err(|error| failed(&relay.endpoint, error))?;
        let news_events = connect(&mut news, &relay.endpoint).await?;
        let mut questions = DealerSocket::with_options(options());
        let question_events = connect(&mut questions, &relay.snapshot_endpoint).await?;
        Ok(Self {
            relay: relay.clone(),
            news,
            news_events,
            questions,
            question_events,
        })
    }

    fn lost(&self) -> PlaneError {
        PlaneError::Lost {
            endpoint: self.relay.endpoint.clone(),
        }
    }
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT);
    options
}

async fn connect(
    socket: &mut impl Socket,
    endpoint: &str,
) -> Result<mpsc::Receiver<SocketEvent>, PlaneError> {
    if !endpoint.starts_with("tcp://") {
        return Err(PlaneError::Address(endpoint.to_owned()));
    }
    let events = socket.monitor();
    let connected = socket.connect(endpoint).await;
    connected.map_err(|error| failed(endpoint, error))?;
    Ok(events)
}

fn failed(endpoint: &str, error: impl std::fmt::Display) -> PlaneError {
    PlaneError::Connect {
        endpoint: endpoint.to_owned(),
        reason: error.to_string(),
    }
}

/// Waits until a socket has lost its peer.
async fn gone(events: &mut mpsc::Receiver<SocketEvent>) {
    loop {
        match events.next().await {
            Some(SocketEvent::Disconnected(_)) | None => return,
            Some(_) => {}
        }
    }
}

#[async_trait]
impl plane::Feed for Feed {
    async fn hear(&mut self) -> Result<Heard, PlaneError> {
        loop {
            let message = tokio::select! {
                message = self.news.recv() => message.map(|message| (true, message)),
                message = self.questions.recv() => message.map(|message| (false, message)),
                () = gone(&mut self.news_events) => return Err(self.lost()),
                () = gone(&mut self.question_events) => return Err(self.lost()),
            };
            let (is_news, message) = message.map_err(|_| self.lost())?;
            match (is_news, message.into_vec().as_mut_slice()) {
                (true, [_, news]) => return Ok(Heard::News(std::mem::take(news))),
                (false, [answer]) => return Ok(Heard::Answer(std::mem::take(answer))),
                // Anything else is not from one of us.
                _ => {}
            }
        }
    }

    async fn ask(&mut self, question: Bytes) -> Result<(), PlaneError> {
        let sent = self.questions.send(ZmqMessage::from(question)).await;
        sent.map_err(|_| self.lost())
    }
}

#[cfg(test)]
mod tests {
    use super::{plane::Feed as _, plane::Outlet as _, *};

    async fn pair() -> (Outlet, Feed) {
        let outlet = Outlet::bind([127, 0, 0, 1].into(), 0).await.unwrap();
        let relay = outlet.ports().advertised("127.0.0.1");
        let feed = Feed::connect(&relay, "kv/a/").await.unwrap();
        (outlet, feed)
    }

    #[tokio::test]
    async fn a_subscriber_hears_its_topics_and_gets_answers() {
        let (mut outlet, mut feed) = pair().await;
        feed.ask(Bytes::from_static(b"what")).await.unwrap();
        let asked = outlet.asked().await.unwrap();
        assert_eq!(asked.question, &b"what"[..]);
        for piece in [&b"this"[..], b"and that"] {
            outlet.answer(&asked.asker, Bytes::from_static(piece)).await;
            assert_eq!(
                feed.hear().await.unwrap(),
                Heard::Answer(Bytes::from_static(piece))
            );
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
    async fn a_publisher_that_goes_is_noticed_and_its_ports_are_free() {
        let (outlet, mut feed) = pair().await;
        let addr = outlet.ports().news;
        drop(outlet);
        assert!(matches!(feed.hear().await, Err(PlaneError::Lost { .. })));
        // The library lets go of a port a moment later.
        while Outlet::bind(addr.ip(), addr.port()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }
}
