//! The task of a client: reaches the worker, offers the connection, and reaches it again when that is lost.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time;
use tracing::{debug, info, warn};

use super::{Link, Shared, State};
use crate::{Code, plane::PlaneError, proto::worker::Load};

/// A worker on the same network answers in milliseconds; this covers one that is starved of CPU.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The wait before the second attempt to connect; it doubles up to [`BACK_OFF_MOST`].
const BACK_OFF_FIRST: Duration = Duration::from_millis(50);

/// The longest wait between two attempts: discovery forgets a dead worker after 10 s anyway.
const BACK_OFF_MOST: Duration = Duration::from_secs(2);

/// Why a connection, or an attempt at one, ended.
#[derive(Debug, thiserror::Error)]
pub(in crate::plane) enum Ended {
    #[error("no answer within {} s", CONNECT_WITHIN.as_secs())]
    NoAnswer,
    #[error("{0}")]
    Lost(String),
    #[error("refused: {message}")]
    Refused { code: Code, message: String },
    #[error("nobody uses it any more")]
    Unused,
}

/// A way to a worker.
#[async_trait]
pub(in crate::plane) trait Reach: Send + Sync {
    /// Dials, introduces itself, and reads the answer.
    async fn greet(&self) -> Result<Box<dyn Session>, Ended>;
}

/// A connection that the worker took.
#[async_trait]
pub(in crate::plane) trait Session: Send {
    /// Returns what requests go through.
    fn link(&self) -> Arc<dyn Link>;

    /// Reads until the connection ends.
    async fn read(self: Box<Self>, told: &Told) -> Ended;
}

/// Takes what a worker tells of itself.
pub(in crate::plane) struct Told {
    shared: Weak<Shared>,
    address: String,
}

impl Told {
    pub(in crate::plane) fn load(&self, load: Load) {
        if let Some(shared) = self.shared.upgrade() {
            *shared.load.lock() = load;
        }
    }

    pub(in crate::plane) fn draining(&self) {
        info!(worker = %self.address, "the worker is draining");
        if let Some(shared) = self.shared.upgrade() {
            shared.state.send_replace(State::Draining);
        }
    }
}

/// Keeps a connection for a [`Client`](super::Client), until the worker refuses for good or nobody uses it.
pub(super) async fn run(shared: Weak<Shared>, address: String, reach: Box<dyn Reach>, seed: u64) {
    let told = Told { shared, address };
    let mut random = SmallRng::seed_from_u64(seed);
    let mut wait = BACK_OFF_FIRST;
    loop {
        let greeted = time::timeout(CONNECT_WITHIN, reach.greet()).await;
        let ended = match greeted.unwrap_or(Err(Ended::NoAnswer)) {
            Ok(session) => {
                wait = BACK_OFF_FIRST;
                serve(&told, session).await
            }
            Err(ended) => ended,
        };
        let Some(shared) = told.shared.upgrade() else {
            return;
        };
        match ended {
            Ended::Refused { code, message } => {
                warn!(worker = %told.address, %message, "refused by the worker");
                shared.state.send_replace(State::Gone { code, message });
                return;
            }
            Ended::Unused => return,
            ended => {
                debug!(worker = %told.address, reason = %ended, "not connected");
                shared.state.send_replace(State::Connecting {
                    reason: ended.to_string(),
                });
            }
        }
        drop(shared);
        // Many processors lose a worker at once; they should not all come back at once.
        time::sleep(wait.mul_f64(random.random_range(0.5..1.5))).await;
        wait = (wait * 2).min(BACK_OFF_MOST);
    }
}

/// Offers the connection to the client until it ends.
async fn serve(told: &Told, session: Box<dyn Session>) -> Ended {
    let link = session.link();
    {
        let Some(shared) = told.shared.upgrade() else {
            return Ended::Unused;
        };
        *shared.link.lock() = Some(link.clone());
        shared.state.send_replace(State::Ready);
    }
    // Ends the streams also when the task itself is ended.
    let end = EndOnDrop {
        link,
        told,
        reason: Mutex::new("the client was closed".to_owned()),
    };
    let ended = session.read(told).await;
    *end.reason.lock() = ended.to_string();
    ended
}

/// Ends all streams of a link, whatever ends its task.
struct EndOnDrop<'a> {
    link: Arc<dyn Link>,
    told: &'a Told,
    reason: Mutex<String>,
}

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.told.shared.upgrade() {
            *shared.link.lock() = None;
        }
        self.link.end(&PlaneError::Disconnected {
            address: self.told.address.clone(),
            reason: std::mem::take(&mut self.reason.lock()),
        });
    }
}
