//! What a pipe does with bytes, with loss, and with a peer or a server that goes.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use stator_common::{
    nats::Nats,
    plane::{
        nats::Listener,
        net::{Dial, Io, Listen, Reader, Writer},
    },
};
use stator_testkit::{nats::NatsServer, wait};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{link, name, raw::Door};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// What an end takes before it has read.
const WINDOW: u64 = 1 << 20;

/// A processor and a worker, each with a connection of its own.
struct Stage {
    processor: Nats,
    listener: Listener,
    subject: String,
}

impl Stage {
    async fn new(server: &NatsServer) -> Self {
        let subject = format!("stator.test.{}", name());
        Self {
            processor: link(server),
            listener: Listener::bind(&link(server), subject.clone())
                .await
                .unwrap(),
            subject,
        }
    }

    async fn pipe(&self) -> (Io, Io) {
        let (dialled, accepted) =
            tokio::join!(self.processor.dial(&self.subject), self.listener.accept());
        (dialled.unwrap(), accepted.unwrap().0)
    }
}

/// Bytes that are not the same at two places.
fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 4);
    let mut state = seed;
    while bytes.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes in pieces of all sizes.
async fn write(mut writer: Writer, bytes: Vec<u8>) -> Writer {
    let mut rest = &bytes[..];
    let mut size = 1;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(size.min(rest.len()));
        writer.write_all(piece).await.unwrap();
        rest = after;
        size = size * 7 % 300_007;
    }
    writer
}

async fn read(mut reader: Reader, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    reader.read_exact(&mut bytes).await.unwrap();
    bytes
}

async fn failed(mut reader: Reader) -> io::Error {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).await.unwrap_err()
}

#[tokio::test]
async fn bytes_arrive_in_order_both_ways_under_load_whatever_size_messages_may_have() {
    for settings in ["", "max_payload: 65536"] {
        let Some(server) = NatsServer::start_with(settings).await else {
            return;
        };
        let stage = Stage::new(&server).await;
        let (here, there) = stage.pipe().await;
        let (out, back) = (noise(24 * MIB, 1), noise(24 * MIB, 2));
        let (_a, _b, there_read, here_read) = tokio::join!(
            write(here.writer, out.clone()),
            write(there.writer, back.clone()),
            read(there.reader, out.len()),
            read(here.reader, back.len()),
        );
        assert!(there_read == out && here_read == back, "{settings}");
    }
}

#[tokio::test]
async fn a_writer_is_ahead_of_its_reader_by_a_window_and_no_more() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let stage = Stage::new(&server).await;
    let (mut here, mut there) = stage.pipe().await;
    let written = Arc::new(AtomicU64::new(0));
    let piece = 16 * KIB;
    let writes = tokio::spawn({
        let written = written.clone();
        async move {
            for _ in 0..512 {
                here.writer.write_all(&[7; 16 * KIB]).await.unwrap();
                written.fetch_add(16 << 10, Ordering::SeqCst);
            }
            here
        }
    });
    let full = WINDOW - 2 * piece as u64;
    wait::until("the window is full", || {
        written.load(Ordering::SeqCst) >= full
    })
    .await;
    let mut taken = 0;
    let mut bytes = vec![0; piece];
    for _ in 0..512 {
        let ahead = written.load(Ordering::SeqCst) - taken;
        assert!(ahead <= WINDOW, "{ahead} bytes ahead");
        there.reader.read_exact(&mut bytes).await.unwrap();
        taken += bytes.len() as u64;
    }
    writes.await.unwrap();
}

#[tokio::test]
async fn a_pipe_that_nobody_reads_does_not_hold_up_another() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let stage = Stage::new(&server).await;
    let (mut stuck, _unread) = stage.pipe().await;
    let (here, there) = stage.pipe().await;
    let full = tokio::spawn(async move { stuck.writer.write_all(&noise(4 * MIB, 3)).await });
    let bytes = noise(8 * MIB, 4);
    let (_writer, read) = tokio::join!(
        write(here.writer, bytes.clone()),
        read(there.reader, bytes.len())
    );
    assert!(read == bytes);
    assert!(!full.is_finished());
    full.abort();
}

#[tokio::test]
async fn what_was_written_comes_before_the_end() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let stage = Stage::new(&server).await;
    for shut in [true, false] {
        let (mut here, mut there) = stage.pipe().await;
        here.writer.write_all(&noise(300 * KIB, 5)).await.unwrap();
        if shut {
            here.writer.shutdown().await.unwrap();
        }
        drop(here);
        let mut bytes = Vec::new();
        there.reader.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes == noise(300 * KIB, 5));
    }
}

#[tokio::test]
async fn a_message_that_is_lost_or_strange_ends_the_pipe_and_none_before_it_is() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let subject = format!("stator.test.{}", name());
    let mut door = Door::open(&server, &subject).await;
    let processor = link(&server);
    // The largest message of the server, and more than a window with what it counts.
    let zeros = vec![0; MIB - 17];
    for case in ["lost", "twice", "strange", "short", "too much", "claim"] {
        let (dialled, peer) = tokio::join!(processor.dial(&subject), door.accept(1, 1 << 20));
        peer.send(3, 0, 0, b"abc").await;
        let why = match case {
            "lost" => {
                peer.send(3, 2, 0, b"ghi").await;
                "message 2 came where 1 was due"
            }
            "twice" => {
                peer.send(3, 0, 0, b"abc").await;
                "message 0 came where 1 was due"
            }
            "strange" => {
                peer.send(9, 1, 0, b"").await;
                "no message of a pipe"
            }
            "short" => {
                peer.send_bytes("x".into()).await;
                "no message of a pipe"
            }
            "claim" => {
                peer.send(3, 1, 1, b"").await;
                "more than was sent"
            }
            _ => {
                peer.send(3, 1, 0, &zeros).await;
                "more than its window"
            }
        };
        let mut io = dialled.unwrap();
        let mut bytes = [0; 3];
        io.reader.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"abc");
        let error = failed(io.reader).await.to_string();
        assert!(error.contains(why), "{case}: {error}");
    }
}

#[tokio::test]
async fn a_small_window_of_the_peer_is_kept() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let subject = format!("stator.test.{}", name());
    let mut door = Door::open(&server, &subject).await;
    let processor = link(&server);
    let (dialled, mut peer) = tokio::join!(processor.dial(&subject), door.accept(1, 8 << 10));
    let mut io = dialled.unwrap();
    let writes = tokio::spawn(async move {
        let written = io.writer.write_all(&noise(64 * KIB, 6)).await;
        (written, io)
    });
    let mut messages = peer.messages.take().unwrap();
    let (mut bytes, mut used, mut number) = (Vec::new(), 0, 0);
    while bytes.len() < 64 * KIB {
        let message = futures::StreamExt::next(&mut messages).await.unwrap();
        // Others ask whether somebody is here.
        if message.payload.len() > 17 {
            assert!(message.payload.len() - 17 + 64 <= 8 * KIB);
            bytes.extend_from_slice(&message.payload[17..]);
            used += message.payload.len() as u64 - 17 + 64;
            peer.send(3, number, used, b"").await;
            number += 1;
        }
    }
    assert!(bytes == noise(64 * KIB, 6));
    writes.await.unwrap().0.unwrap();
}

#[tokio::test]
async fn a_peer_that_vanishes_or_was_never_there_is_noticed_by_the_server() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let subject = format!("stator.test.{}", name());
    let processor = link(&server);
    let nobody = processor.dial(&subject).await.err().unwrap();
    assert_eq!(nobody.kind(), io::ErrorKind::ConnectionRefused);
    let mut door = Door::open(&server, &subject).await;
    let (dialled, mut peer) = tokio::join!(processor.dial(&subject), door.accept(1, 1 << 20));
    peer.vanish().await;
    let error = failed(dialled.unwrap().reader).await;
    assert!(error.to_string().contains("gone from NATS"), "{error}");
}

#[tokio::test]
async fn another_version_is_told_apart() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let subject = format!("stator.test.{}", name());
    let mut door = Door::open(&server, &subject).await;
    let processor = link(&server);
    let (dialled, _peer) = tokio::join!(processor.dial(&subject), door.accept(2, 1 << 20));
    let error = dialled.err().unwrap().to_string();
    assert!(error.contains("version 2"), "{error}");
}

#[tokio::test]
async fn a_server_that_starts_again_ends_pipes_and_carries_new_ones() {
    let Some(mut server) = NatsServer::start().await else {
        return;
    };
    let stage = Stage::new(&server).await;
    for _ in 0..2 {
        let (here, there) = stage.pipe().await;
        server.kill();
        for reader in [here.reader, there.reader] {
            let error = failed(reader).await;
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        }
        let refused = stage.processor.dial(&stage.subject).await.err().unwrap();
        assert!(refused.to_string().contains("is lost"), "{refused}");
        server.restart().await;
        // The two ends come back one after the other.
        let mut dialled = stage.processor.dial(&stage.subject).await;
        while dialled.is_err() {
            tokio::time::sleep(wait::PAUSE).await;
            dialled = stage.processor.dial(&stage.subject).await;
        }
        let (mut there, _) = stage.listener.accept().await.unwrap();
        there.writer.write_all(b"again").await.unwrap();
        assert_eq!(read(dialled.unwrap().reader, 5).await, b"again");
    }
}
