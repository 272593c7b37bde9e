//! The processor's end: one [`Client`] per worker, which connects again by itself.
//!
//! A task per client reaches the worker and distributes what comes (`task`); how it is reached depends on the address
//! ([`reach`]). Requests are sent by whoever makes them, through a [`Link`].

mod streams;
mod task;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use super::{
    Address, DEAD_AFTER, PING_EVERY, PlaneError, http,
    net::{Dial, Tcp},
    stream::{DeltaStream, Slot},
    tcp::{self, frame},
    tls::TlsDial,
};
use crate::{
    Code,
    ids::{BlobHash, WorkerId},
    nats::Nats,
    proto::worker::{Delta, GenerateRequest, Load},
    tls,
};
pub(super) use streams::Streams;
pub(super) use task::{Ended, Reach, Session, Told};

/// The largest blob that is taken: tokenizers reach 40 MiB.
pub(super) const MAX_BLOB: usize = 256 << 20;

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
    /// The link for workers that are reached by NATS; default to where a server is by default.
    pub nats: Nats,
    /// How workers are known that speak TLS. Absent: those are refused.
    pub tls: Option<Arc<tls::Client>>,
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
            nats: Nats::default(),
            tls: None,
            unclaimed: Arc::new(drop),
        }
    }
}

/// One connection to a worker, from its greeting to its end, as those see it who have requests for it.
pub(super) trait Link: Send + Sync {
    /// Returns how many streams are open.
    fn in_flight(&self) -> usize;

    /// Sends a request of `size` encoded bytes, and opens its stream. Never blocks.
    fn submit(
        &self,
        request: &GenerateRequest,
        size: usize,
    ) -> Result<(Arc<Slot>, u32), PlaneError>;

    /// Tells the worker that nobody reads a stream any more, unless it has ended.
    ///
    /// - `slot`: the stream's; what lies in it is nobody's any more.
    fn cancel(&self, stream: u32, slot: &Slot);

    /// Asks for a blob: absent, if the worker has none. The answer is dropped if the connection ends before it
    /// has come.
    fn ask_blob(&self, hash: &BlobHash) -> oneshot::Receiver<Option<Bytes>>;

    /// Ends every stream.
    fn end(&self, error: &PlaneError);
}

fn is_this_machine(place: &str) -> bool {
    let socket: Result<SocketAddr, _> = place.parse();
    socket.map_or_else(
        |_| place.starts_with("localhost:"),
        |socket| socket.ip().is_loopback(),
    )
}

/// Returns the way to an address.
///
/// # Errors
/// Why there is none: nothing will change that.
fn reach(address: &str, config: ClientConfig) -> Result<Box<dyn Reach>, String> {
    let parsed: Address = address.parse().map_err(|error| format!("{error}"))?;
    let over_tls = |speech| {
        let tls = config.tls.clone().ok_or_else(|| {
            format!("{address} speaks TLS: name the certificates to check it with, --request-plane-tls-ca")
        })?;
        Ok::<_, String>(Arc::new(TlsDial { tls, speech }))
    };
    let in_clear = matches!(parsed, Address::Tcp(_) | Address::Http(_));
    if in_clear && config.tls.is_some() && !is_this_machine(parsed.place()) {
        return Err(format!(
            "{address} is not encrypted, and --request-plane-tls-ca asks for TLS: give the worker --request-plane-tls-cert and -key"
        ));
    }
    let dial: Arc<dyn Dial> = match &parsed {
        Address::Tcp(_) | Address::Http(_) => Arc::new(Tcp),
        Address::Tls(_) => over_tls(&[])?,
        Address::Https(_) => over_tls(&["h2"])?,
        Address::Nats(_) => Arc::new(config.nats.clone()),
    };
    let address = address.to_owned();
    let place = parsed.place().to_owned();
    let scheme = match parsed {
        Address::Http(_) => "http",
        Address::Https(_) => "https",
        Address::Tcp(_) | Address::Tls(_) | Address::Nats(_) => {
            return Ok(Box::new(tcp::client::Frames {
                address,
                place,
                dial,
                config,
            }));
        }
    };
    Ok(Box::new(http::client::Grpc {
        address,
        place,
        scheme,
        dial,
        config,
    }))
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
    state: watch::Sender<State>,
    link: Mutex<Option<Arc<dyn Link>>>,
    load: Mutex<Load>,
    _stop: DropGuard,
}

impl Client {
    /// Starts to connect to an address, as a card carries it ([`Address`]), in a task of its own. One that cannot be
    /// used is [`State::Gone`].
    pub fn connect(address: impl Into<String>, config: ClientConfig) -> Self {
        let stop = CancellationToken::new();
        let (state, _) = watch::channel(State::Connecting {
            reason: "first attempt".to_owned(),
        });
        let shared = Arc::new(Shared {
            address: address.into(),
            state,
            link: Mutex::new(None),
            load: Mutex::new(Load::default()),
            _stop: stop.clone().drop_guard(),
        });
        let seed = config.seed;
        match reach(&shared.address, config) {
            Ok(reach) => {
                let (weak, address) = (Arc::downgrade(&shared), shared.address.clone());
                let task = task::run(weak, address, reach, seed);
                tokio::spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = task => {}
                    }
                });
            }
            Err(message) => {
                warn!(
                    worker = shared.address,
                    message, "the worker's address is of no use"
                );
                let code = Code::Incompatible;
                shared.state.send_replace(State::Gone { code, message });
            }
        }
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
        let (slot, stream) = link.submit(request, size)?;
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

    fn link(&self) -> Result<Arc<dyn Link>, PlaneError> {
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
