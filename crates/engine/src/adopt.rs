//! Takes over an engine that outlived its worker.
//!
//! The engine redials the addresses that it was given once. So the same addresses are bound again, and
//! a question is asked as soon as there is a connection; its answer comes after everything that the
//! engine has queued meanwhile, which is read away and aborted.

use std::{future::Future, io, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::info;
use zeromq::{SocketRecv, ZmqError};

use crate::{
    connected::Connected,
    engine::CLIENT_INDEX,
    output::Message,
    rundir::Record,
    schema::SchemaError,
    sockets::{Place, Sender, Sockets},
    utilities,
    wire::{self, Codec},
};

/// An engine that is there dials in within its redial interval; one that has not by now is gone.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// How often sending is tried until the engine is connected. It redials every 100 ms.
const TRY_EVERY: Duration = Duration::from_millis(5);
/// Does nothing, and is answered.
const QUESTION: &str = "is_scheduler_paused";

/// Why a running engine was not taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotAdopted {
    #[error("its addresses cannot be bound: {0}")]
    Bind(#[from] ZmqError),
    #[error("it was recorded with a schema that cannot be used: {0}")]
    Schema(#[from] SchemaError),
    #[error("it ended")]
    Ended,
    #[error("it said that it is dead")]
    Dead,
    #[error("it did not dial in within {} ms", .0.as_millis())]
    NotConnected(Duration),
    #[error("it dialled in but did not answer within {} ms", .0.as_millis())]
    NoAnswer(Duration),
    #[error("its log cannot be read: {0}")]
    Log(io::Error),
    #[error("it cannot be guarded: {0}")]
    Guard(io::Error),
}

/// Takes over the engine of `record`.
///
/// - `ended`: completes when its process has ended.
pub(crate) async fn adopt(
    record: &Record,
    ended: impl Future<Output = ()>,
    patience: Duration,
) -> Result<Connected, NotAdopted> {
    let began = Instant::now();
    let life = record.life + 1;
    let codec = Codec::new(&record.schema)?;
    let sockets = Sockets::bind(Place::Again(&record.endpoints)).await?;
    let mut wires = sockets.split();
    let identity = Bytes::from(record.identity.clone());
    let sender = Sender::new(wires.requests.clone(), identity.clone());

    let question = utilities::question(life);
    let mut asked = false;
    let mut orphans = 0;
    let mut tries = interval(TRY_EVERY);
    tries.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(ended);
    let connect_within = CONNECT_WITHIN.min(patience);
    let (until, unconnected) = (sleep(patience), sleep(connect_within));
    tokio::pin!(until, unconnected);
    loop {
        tokio::select! {
            frames = wires.outputs.recv() => {
                let Ok(frames) = frames else { continue };
                match codec.decode_outputs(&frames, |_| None) {
                    Ok(Message::Dead) => return Err(NotAdopted::Dead),
                    Ok(Message::Batch(batch)) => {
                        for orphan in &batch.orphans {
                            if let Ok(id) = std::str::from_utf8(orphan)
                                && sender.send(wire::ABORT, codec.encode_abort(std::iter::once(id))).is_ok()
                            {
                                orphans += 1;
                            }
                        }
                        if batch.utility.is_some_and(|answer| answer.call_id == question) {
                            break;
                        }
                    }
                    // Of no use to anybody any more; what matters is that the answer follows.
                    Err(_) => {}
                }
            }
            // Receiving is what keeps the connection served.
            _ = wires.incoming.recv() => {}
            _ = tries.tick(), if !asked => {
                let payload = codec.encode_utility(CLIENT_INDEX, question, QUESTION, &[]);
                asked = sender.send(wire::UTILITY, payload).is_ok();
            }
            () = &mut ended => return Err(NotAdopted::Ended),
            () = &mut unconnected, if !asked => return Err(NotAdopted::NotConnected(connect_within)),
            () = &mut until => return Err(NotAdopted::NoAnswer(patience)),
        }
    }
    info!(
        took_ms = began.elapsed().as_millis(),
        orphans, "adopted the running engine"
    );
    let schema = record.schema.clone();
    let ready = record.ready.clone();
    Ok(Connected {
        wires,
        identity,
        ready,
        schema,
        local: None,
        life,
    })
}
