//! The coordinator: knows the wave, and wakes ranks for the next.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};
use zeromq::{
    PullSocket, Socket, SocketRecv, SocketSend, XPubSocket, ZmqError, ZmqMessage, ZmqResult,
};

use super::{Shared, notice::Notice};
use crate::wire::Writer;

/// The type of the message that wakes ranks (`EngineCoreRequestType.START_DP_WAVE`).
const START_WAVE: &[u8] = b"\x02";

/// What ranks wait for before they call themselves ready.
const READY: &[u8] = b"READY";

pub(super) struct Coordinator {
    pub(super) input: String,
    pub(super) output: String,
    ranks: u32,
    to_ranks: XPubSocket,
    from_ranks: PullSocket,
    shared: Arc<Shared>,
    wave: u32,
    /// Whether the ranks step, by their own word.
    running: bool,
}

impl Coordinator {
    pub(super) async fn bind(host: &str, ranks: u32, shared: Arc<Shared>) -> ZmqResult<Self> {
        let mut to_ranks = XPubSocket::new();
        let mut from_ranks = PullSocket::new();
        let any = format!("tcp://{host}:0");
        Ok(Self {
            input: to_ranks.bind(&any).await?.to_string(),
            output: from_ranks.bind(&any).await?.to_string(),
            ranks,
            to_ranks,
            from_ranks,
            shared,
            wave: 0,
            running: false,
        })
    }

    /// Serves until it is dropped.
    ///
    /// - `requested`: ranks that were sent a request while all were believed to sleep.
    pub(super) async fn run(mut self, mut requested: mpsc::UnboundedReceiver<u32>) {
        let mut subscribed = 0;
        loop {
            let done = tokio::select! {
                message = self.to_ranks.recv() => match message {
                    Ok(message) if is_subscription(&message) => {
                        subscribed += 1;
                        self.welcome(subscribed).await
                    }
                    Ok(_) => Ok(()),
                    Err(error) => Err(error),
                },
                message = self.from_ranks.recv() => match message {
                    Ok(message) => self.notice(&message).await,
                    Err(error) => Err(error),
                },
                rank = requested.recv() => match rank {
                    Some(rank) if !self.running => self.start(Some(rank)).await,
                    Some(_) => Ok(()),
                    None => return,
                },
            };
            if let Err(error) = done {
                // Of one rank's connection; that the rank is gone is noticed elsewhere.
                warn!(%error, "coordinator");
            }
        }
    }

    /// Lets ranks go on once all are there.
    async fn welcome(&mut self, subscribed: u32) -> Result<(), ZmqError> {
        if subscribed < self.ranks {
            return Ok(());
        }
        info!(ranks = self.ranks, "all ranks are there");
        self.to_ranks.send(Bytes::from_static(READY).into()).await
    }

    async fn notice(&mut self, message: &ZmqMessage) -> Result<(), ZmqError> {
        let (Some(layout), Some(bytes)) = (self.shared.layout.get(), message.get(0)) else {
            return Ok(());
        };
        let notice = match layout.read(bytes) {
            Ok(notice) => notice,
            Err(error) => {
                warn!(%error, "a rank's notice cannot be read");
                return Ok(());
            }
        };
        if self.take(notice) {
            self.start(Some(notice.rank)).await?;
        }
        Ok(())
    }

    /// Takes a notice in; says whether the other ranks must be woken.
    fn take(&mut self, notice: Notice) -> bool {
        match notice {
            Notice {
                complete: Some(wave),
                ..
            } if self.wave <= wave => {
                self.set(wave + 1, false);
                false
            }
            Notice {
                start: Some(wave), ..
            } if wave > self.wave || (wave == self.wave && !self.running) => {
                self.set(wave, true);
                true
            }
            _ => false,
        }
    }

    fn set(&mut self, wave: u32, running: bool) {
        debug!(wave, running, "wave");
        (self.wave, self.running) = (wave, running);
        self.shared.wave.store(wave, Ordering::Release);
        self.shared.running.store(running, Ordering::Release);
    }

    /// Wakes all ranks but one, which is awake.
    async fn start(&mut self, but: Option<u32>) -> Result<(), ZmqError> {
        let mut writer = Writer::default();
        writer.array(2);
        writer.uint(u64::from(self.wave));
        match but {
            Some(rank) => writer.uint(u64::from(rank)),
            None => writer.nil(),
        }
        let mut message = ZmqMessage::from(Bytes::from_static(START_WAVE));
        message.push_back(writer.bytes.into());
        self.to_ranks.send(message).await
    }
}

fn is_subscription(message: &ZmqMessage) -> bool {
    message
        .get(0)
        .is_some_and(|frame| frame.first() == Some(&1))
}

#[cfg(test)]
mod tests {
    use zeromq::{PushSocket, XSubSocket};

    use super::*;
    use crate::{
        lockstep::Lockstep,
        schema::{Schema, Untested},
    };

    /// A rank, as far as waves go.
    struct Rank {
        from: XSubSocket,
        to: PushSocket,
        number: u32,
    }

    impl Rank {
        async fn new(lockstep: &Lockstep, number: u32) -> Self {
            let (mut from, mut to) = (XSubSocket::new(), PushSocket::new());
            from.connect(&lockstep.addresses().input).await.unwrap();
            to.connect(&lockstep.addresses().output).await.unwrap();
            from.send(Bytes::from_static(b"\x01").into()).await.unwrap();
            Self { from, to, number }
        }

        /// Waits for the next message of two frames: wave and who is left out.
        async fn woken(&mut self) -> (u64, Option<u64>) {
            let message = self.from.recv().await.unwrap();
            assert_eq!(message.get(0).unwrap(), START_WAVE);
            let mut reader = crate::wire::Reader::new(message.get(1).unwrap());
            assert_eq!(reader.array().unwrap(), 2);
            let wave = u64::from(reader.u32().unwrap());
            let nil = reader.nil().unwrap();
            (wave, (!nil).then(|| u64::from(reader.u32().unwrap())))
        }

        /// Tells of a wave, as vLLM 0.32 writes it.
        async fn tell(&mut self, complete: Option<u32>, start: Option<u32>) {
            let schema = schema();
            let fields = &schema.table("EngineCoreOutputs").unwrap().fields;
            let mut writer = Writer::default();
            writer.array(fields.len());
            for field in fields {
                match (field.name.as_str(), complete, start) {
                    ("engine_index", ..) => writer.uint(u64::from(self.number)),
                    ("outputs", ..) => writer.array(0),
                    ("wave_complete", Some(wave), _) | ("start_wave", _, Some(wave)) => {
                        writer.uint(u64::from(wave));
                    }
                    _ => writer.nil(),
                }
            }
            let bytes = Bytes::from(writer.bytes);
            self.to.send(bytes.into()).await.unwrap();
        }
    }

    fn schema() -> Schema {
        Schema::built_in("0.32.0", Untested::Refuse).unwrap()
    }

    #[tokio::test]
    async fn ranks_wait_for_each_other_and_are_woken_wave_by_wave() {
        let lockstep = Lockstep::start(2).await.unwrap();
        let first = lockstep.rank(0, &schema()).unwrap();
        let second = lockstep.rank(1, &schema()).unwrap();
        let mut ranks = [Rank::new(&lockstep, 0).await, Rank::new(&lockstep, 1).await];
        for rank in &mut ranks {
            let ready = rank.from.recv().await.unwrap();
            assert_eq!(ready.get(0).unwrap(), READY);
        }
        // The first request to sleeping ranks wakes the others, further ones do not.
        second.requested();
        first.requested();
        for rank in &mut ranks {
            assert_eq!(rank.woken().await, (0, Some(1)));
        }
        // Rank 0 says that all step, and later that all sleep.
        ranks[0].tell(None, Some(0)).await;
        for rank in &mut ranks {
            assert_eq!(rank.woken().await, (0, Some(0)));
        }
        ranks[0].tell(Some(0), None).await;
        while first.wave() != 1 {
            tokio::task::yield_now().await;
        }
        first.requested();
        for rank in &mut ranks {
            assert_eq!(rank.woken().await, (1, Some(0)));
        }
        // A rank got a request of a wave that was over.
        ranks[1].tell(None, Some(3)).await;
        for rank in &mut ranks {
            assert_eq!(rank.woken().await, (3, Some(1)));
        }
        assert_eq!(first.wave(), 3);
    }
}
