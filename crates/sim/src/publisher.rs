//! KV events on a PUB socket, and a ROUTER that says again what somebody missed.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::sync::mpsc;
use tracing::warn;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

use crate::config::KvEvents;
use crate::link;

/// Sequence number of the marker that ends a replay.
const END_OF_REPLAY: [u8; 8] = [0xff; 8];

/// Publishes batches; dropping it ends the publication.
#[derive(Debug)]
pub struct Publisher {
    batches: mpsc::UnboundedSender<Bytes>,
}

/// Why events cannot be published.
#[derive(Debug, thiserror::Error)]
#[error("publish KV events at {endpoint}: {source}")]
pub struct PublisherError {
    endpoint: String,
    source: zeromq::ZmqError,
}

impl Publisher {
    /// Binds the endpoints, with the rank added to their ports, and writes them into `config`.
    ///
    /// As with vLLM, an endpoint without a wildcard is connected to, not bound.
    ///
    /// # Errors
    /// [`PublisherError`].
    pub async fn bind(config: &mut KvEvents, rank: u32) -> Result<Self, PublisherError> {
        let mut publish = PubSocket::new();
        let endpoint = offset(&config.endpoint, rank);
        if endpoint.contains('*') || endpoint.contains("::") || endpoint.starts_with("ipc:") {
            config.endpoint = bind(&mut publish, &endpoint).await?;
        } else {
            link::connect(&mut publish, &endpoint).await;
            config.endpoint = endpoint;
        }
        let mut replay = None;
        if let Some(endpoint) = &mut config.replay_endpoint {
            let mut socket = RouterSocket::new();
            *endpoint = bind(&mut socket, &offset(endpoint, rank)).await?;
            replay = Some(socket);
        }
        let (batches, queue) = mpsc::unbounded_channel();
        tokio::spawn(run(
            publish,
            replay,
            queue,
            Bytes::from(config.topic.clone()),
            config.buffer_steps,
        ));
        Ok(Self { batches })
    }

    /// Publishes one batch.
    pub fn publish(&self, batch: Vec<u8>) {
        // The task ends only with this sender.
        let _ = self.batches.send(Bytes::from(batch));
    }
}

async fn run(
    mut publish: PubSocket,
    mut replay: Option<RouterSocket>,
    mut queue: mpsc::UnboundedReceiver<Bytes>,
    topic: Bytes,
    keep: usize,
) {
    let mut seq = 0u64;
    let mut kept: VecDeque<(u64, Bytes)> = VecDeque::new();
    loop {
        let asked = async {
            match &mut replay {
                Some(socket) => socket.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            batch = queue.recv() => {
                let Some(batch) = batch else { return };
                let message = frames(&[topic.clone(), seq_bytes(seq), batch.clone()]);
                if let Err(error) = publish.send(message).await {
                    warn!(%error, "publish KV events");
                }
                kept.push_back((seq, batch));
                if kept.len() > keep {
                    kept.pop_front();
                }
                seq += 1;
            }
            message = asked => {
                if let (Ok(message), Some(socket)) = (message, &mut replay) {
                    say_again(socket, message, &topic, &kept).await;
                }
            }
        }
    }
}

async fn say_again(
    socket: &mut RouterSocket,
    request: ZmqMessage,
    topic: &Bytes,
    kept: &VecDeque<(u64, Bytes)>,
) {
    let request = request.into_vec();
    let [client, _, start] = request.as_slice() else {
        warn!(frames = request.len(), "invalid replay request");
        return;
    };
    let start = start
        .iter()
        .fold(0u64, |seq, &byte| seq << 8 | u64::from(byte));
    let missed = kept.iter().filter(|(seq, _)| *seq >= start);
    let answers = missed
        .map(|(seq, batch)| [topic.clone(), seq_bytes(*seq), batch.clone()])
        .chain([[
            Bytes::new(),
            Bytes::from_static(&END_OF_REPLAY),
            Bytes::new(),
        ]]);
    for [topic, seq, batch] in answers {
        let message = frames(&[client.clone(), Bytes::new(), topic, seq, batch]);
        if let Err(error) = socket.send(message).await {
            warn!(%error, "replay KV events");
            return;
        }
    }
}

/// Binds, and says where: as configured, as vLLM does, unless the port was left open.
async fn bind(socket: &mut impl Socket, endpoint: &str) -> Result<String, PublisherError> {
    // libzmq takes such an address for the one of IPv4 in it, and takes over a file that is there.
    let wanted = endpoint.replace('*', "0.0.0.0").replace("::ffff:", "");
    if let Some(path) = wanted.strip_prefix("ipc://") {
        let _ = std::fs::remove_file(path);
    }
    match socket.bind(&wanted).await {
        Ok(bound) if endpoint == "tcp://*:0" => {
            Ok(bound.to_string().replace("0.0.0.0", "127.0.0.1"))
        }
        Ok(_) => Ok(endpoint.to_owned()),
        Err(source) => Err(PublisherError {
            endpoint: wanted,
            source,
        }),
    }
}

/// Every rank has a place of its own: vLLM's `offset_endpoint_port`.
fn offset(endpoint: &str, rank: u32) -> String {
    if rank > 0 && endpoint.contains("inproc") {
        return format!("{endpoint}_dp{rank}");
    }
    let port = endpoint
        .rsplit_once(':')
        .filter(|_| endpoint.starts_with("tcp:"))
        .and_then(|(base, port)| Some((base, port.parse::<u32>().ok()?)));
    match port {
        Some((base, port)) if port > 0 => format!("{base}:{}", port + rank),
        _ => endpoint.to_owned(),
    }
}

fn seq_bytes(seq: u64) -> Bytes {
    Bytes::copy_from_slice(&seq.to_be_bytes())
}

fn frames<const N: usize>(frames: &[Bytes; N]) -> ZmqMessage {
    let [first, rest @ ..] = &frames[..] else {
        unreachable!("a message has a frame");
    };
    let mut message = ZmqMessage::from(first.clone());
    for frame in rest {
        message.push_back(frame.clone());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::offset;

    #[test]
    fn every_rank_has_its_own_place() {
        assert_eq!(offset("tcp://*:5557", 3), "tcp://*:5560");
        assert_eq!(offset("tcp://*:0", 3), "tcp://*:0");
        assert_eq!(offset("ipc:///tmp/x", 0), "ipc:///tmp/x");
        assert_eq!(offset("ipc:///tmp/inproc.x", 2), "ipc:///tmp/inproc.x_dp2");
    }
}
