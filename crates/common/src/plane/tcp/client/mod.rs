//! The processor's end: one [`Client`] per worker, which connects again by itself.
//!
//! A task per client dials, reads and distributes deltas to slots (`task`). Requests are written to the
//! socket by whoever makes them (`link`).

mod link;
mod task;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(super) use link::Link;

use super::{
    DEAD_AFTER, PING_EVERY, PlaneError, frame,
    net::{Dial, Tcp},
    stream::DeltaStream,
};
use crate::{
    Code,
    ids::{BlobHash, WorkerId},
    proto::worker::{Delta, GenerateRequest, Load},
};
use task::Task;

/// How a processor connects.
#[derive(Clone)]
pub struct ClientConfig {
    /// The worker meant; another one at the same address is refused. Absent: any.
    pub worker: Option<WorkerId>,
    /// The shared secret, for workers that ask for one.
    pub token: Option<String>,
    /// Bytes that may wait to be written before new requests are refused; default 64 MiB.
    pub max_backlog: usize,
    /// Default [`PING_EVERY`].
    pub ping_every: Duration,
    /// Default [`DEAD_AFTER`].
    pub dead_after: Duration,
    /// Seed of the back-off's jitter; default random.
    pub seed: u64,
    /// How to dial; default TCP.
    pub dial: Arc<dyn Dial>,
    /// Takes deltas that carry `kv_transfer_params` and that nobody will read, since their stream was
    /// cancelled: an engine keeps that KV until somebody gives it back. Default: they are dropped.
    pub unclaimed: Unclaimed,
}

/// Takes what nobody will read; see [`ClientConfig::unclaimed`]. Called by the connection's task: it must not
/// block.
pub type Unclaimed = Arc<dyn Fn(Delta) + Send + Sync>;

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            worker: None,
            token: None,
            max_backlog: 64 << 20,
            ping_every: PING_EVERY,
            dead_after: DEAD_AFTER,
            seed: rand::random(),
            dial: Arc::new(Tcp),
            unclaimed: Arc::new(drop),
        }
    }
}

/// How a client stands with its worker.
#[derive(Clone, Debug)]
pub enum State {
    /// Dialling, for the first time or again.
    Connecting { reason: String },
    /// Requests are taken.
    Ready,
    /// The worker finishes what runs and takes nothing new.
    Draining,
    /// The worker refused this client for good (another version, a wrong token, another worker at its
    /// address). Nothing is tried any more.
    Gone { code: Code, message: String },
}

/// A processor's link to one worker. Cheap to clone. The connection closes when the last clone and the last
/// [`DeltaStream`] are gone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    address: String,
    max_backlog: usize,
    state: watch::Sender<State>,
    link: Mutex<Option<Arc<Link>>>,
    load: Mutex<Load>,
    _stop: DropGuard,
}

impl Client {
    /// Starts to connect to `address` (`host:port`), in a task of its own.
    pub fn connect(address: impl Into<String>, config: ClientConfig) -> Self {
        let stop = CancellationToken::new();
        let (state, _) = watch::channel(State::Connecting {
            reason: "first attempt".to_owned(),
        });
        let shared = Arc::new(Shared {
            address: address.into(),
            max_backlog: config.max_backlog,
            state,
            link: Mutex::new(None),
            load: Mutex::new(Load::default()),
            _stop: stop.clone().drop_guard(),
        });
        let task = Task {
            address: shared.address.clone(),
            shared: Arc::downgrade(&shared),
            config,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.run() => {}
            }
        });
        Self { shared }
    }

    /// Returns where the worker is.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// Returns how it stands with the worker, now and from now on.
    pub fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    /// Waits until requests are taken. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::Refused`]: they will never be. It waits as long as the worker cannot be reached.
    pub async fn ready(&self) -> Result<(), PlaneError> {
        let mut state = self.state();
        let state = state
            .wait_for(|state| matches!(state, State::Ready | State::Gone { .. }))
            .await
            .map(|state| state.clone());
        match state {
            Ok(State::Gone { code, message }) => Err(self.refused(code, message)),
            // The sender lives in `self.shared`.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Returns the load that the worker last told, zeros before.
    pub fn load(&self) -> Load {
        *self.shared.load.lock()
    }

    /// Returns how many requests of this client run at the worker.
    pub fn in_flight(&self) -> usize {
        self.shared
            .link
            .lock()
            .as_ref()
            .map_or(0, |link| link.in_flight())
    }

    /// Sends a request. Written by the caller's own task, without waiting.
    ///
    /// # Errors
    /// What stands in the way of sending it. What the worker has against it comes as the stream's
    /// last delta.
    pub fn generate(&self, request: &GenerateRequest) -> Result<DeltaStream, PlaneError> {
        let link = self.link()?;
        if matches!(*self.shared.state.borrow(), State::Draining) {
            return Err(PlaneError::Draining {
                address: self.shared.address.clone(),
            });
        }
        let size = prost::Message::encoded_len(request);
        let limit = frame::MAX_FRAME - frame::HEADER;
        if size > limit {
            return Err(PlaneError::TooLarge { size, limit });
        }
        let (slot, stream) = link.submit(request, size, &self.shared)?;
        Ok(DeltaStream::new(self.clone(), link, slot, stream))
    }

    /// Fetches a file by its content. Cancel safe.
    ///
    /// # Errors
    /// [`PlaneError::NoBlob`], [`PlaneError::WrongBlob`], a lost connection.
    pub async fn blob(&self, hash: &BlobHash) -> Result<Bytes, PlaneError> {
        let link = self.link()?;
        let answer = link.ask_blob(hash);
        let lost = || PlaneError::Disconnected {
            address: self.shared.address.clone(),
            reason: "while a file was fetched".to_owned(),
        };
        match answer.await {
            Err(_) => Err(lost()),
            Ok(None) => Err(PlaneError::NoBlob {
                address: self.shared.address.clone(),
                hash: hash.clone(),
            }),
            Ok(Some(bytes)) if BlobHash::of(&bytes) == *hash => Ok(bytes),
            Ok(Some(_)) => Err(PlaneError::WrongBlob {
                address: self.shared.address.clone(),
                hash: hash.clone(),
            }),
        }
    }

    fn link(&self) -> Result<Arc<Link>, PlaneError> {
        if let Some(link) = &*self.shared.link.lock() {
            return Ok(link.clone());
        }
        Err(match self.shared.state.borrow().clone() {
            State::Gone { code, message } => self.refused(code, message),
            State::Connecting { reason } => self.not_connected(reason),
            State::Ready | State::Draining => self.not_connected("just lost".to_owned()),
        })
    }

    fn refused(&self, code: Code, message: String) -> PlaneError {
        PlaneError::Refused {
            address: self.shared.address.clone(),
            code,
            message,
        }
    }

    fn not_connected(&self, reason: String) -> PlaneError {
        PlaneError::NotConnected {
            address: self.shared.address.clone(),
            reason,
        }
    }
}
