//! A relay: views of engines, kept and told.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    thread,
};

use parking_lot::Mutex;
use stator_common::{
    WorkerId, card,
    events::{
        ViewId, nats,
        plane::{Outlet, PlaneError},
        zmq,
    },
    nats::Nats,
};
use stator_engine::kv_events::Endpoints;
use tokio::{runtime, sync::mpsc};
use tokio_util::{sync::CancellationToken, sync::DropGuard};

use crate::{
    hub::{self, Desks, Outgoing},
    keeper::Keeper,
    metrics,
};

/// Messages that may wait to be published. Beyond, keepers wait, and engines are asked later for what they say
/// meanwhile.
const OUTGOING: usize = 256;

/// Questions that may wait for one view. Beyond, followers are told to ask again.
const QUESTIONS: usize = 256;

/// Why a relay cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error(transparent)]
    Plane(#[from] PlaneError),
    #[error("start a thread for the relay: {0}")]
    Thread(#[from] io::Error),
}

/// Where a relay publishes.
#[derive(Clone)]
pub enum Place {
    /// On two ports of this machine: news, and questions on the next one. 0: two free ones.
    Zmq { host: IpAddr, port: u16 },
    /// At a NATS server, under a name.
    Nats { nats: Nats, name: String },
}

/// Where it was bound.
enum Bound {
    Zmq(zmq::Ports),
    Nats(card::Relay),
}

/// A relay. Dropping it ends it.
pub struct Relay {
    /// Where its tasks run.
    runtime: runtime::Handle,
    /// Ends the thread of that runtime, if it is the relay's own.
    _thread: Option<DropGuard>,
    bound: Bound,
    out: mpsc::Sender<Outgoing>,
    desks: Desks,
    kept: Mutex<HashMap<ViewId, Kept>>,
}

struct Kept {
    endpoints: Endpoints,
    _stop: DropGuard,
}

impl Relay {
    /// Binds the event plane, and keeps no view yet.
    ///
    /// # Errors
    /// [`PlaneError::Listen`] and [`PlaneError::Nats`].
    pub async fn bind(place: Place) -> Result<Self, PlaneError> {
        metrics::describe();
        let (outlet, bound): (Box<dyn Outlet>, _) = match place {
            Place::Zmq { host, port } => {
                let outlet = zmq::Outlet::bind(host, port).await?;
                let ports = outlet.ports();
                (Box::new(outlet), Bound::Zmq(ports))
            }
            Place::Nats { nats, name } => {
                let outlet = nats::Outlet::bind(&nats, &name).await?;
                (Box::new(outlet), Bound::Nats(nats::advertised(&name)))
            }
        };
        let (out, outgoing) = mpsc::channel(OUTGOING);
        let desks = Desks::default();
        tokio::spawn(hub::run(outlet, outgoing, desks.clone()));
        Ok(Self {
            runtime: runtime::Handle::current(),
            _thread: None,
            bound,
            out,
            desks,
            kept: Mutex::default(),
        })
    }

    /// Like [`Relay::bind`], with a thread of its own: a large view is told in one go, which would hold up whatever
    /// else runs on the caller's.
    ///
    /// # Errors
    /// [`RelayError`].
    pub async fn bind_apart(place: Place) -> Result<Self, RelayError> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        thread::Builder::new()
            .name("kv-relay".to_owned())
            .spawn(move || runtime.block_on(stopped))?;
        let thread = Some(stop.drop_guard());
        let bound = handle.spawn(Self::bind(place)).await;
        let relay = bound.expect("binding does not panic")?;
        Ok(Self {
            _thread: thread,
            ..relay
        })
    }

    /// Returns the bound address of what is published, where it is published on a port.
    pub fn addr(&self) -> Option<SocketAddr> {
        match &self.bound {
            Bound::Zmq(ports) => Some(ports.news),
            Bound::Nats(_) => None,
        }
    }

    /// Returns where followers find this relay.
    ///
    /// - `host`: under which they reach this machine.
    pub fn advertised(&self, host: &str) -> card::Relay {
        match &self.bound {
            Bound::Zmq(ports) => ports.advertised(host),
            Bound::Nats(relay) => relay.clone(),
        }
    }

    /// Keeps a view from here on, of the engine that is heard there. Of the same one again, nothing changes.
    pub fn keep(&self, view: ViewId, endpoints: Endpoints) {
        let mut kept = self.kept.lock();
        if kept
            .get(&view)
            .is_some_and(|known| known.endpoints == endpoints)
        {
            return;
        }
        let (desk, asks) = mpsc::channel(QUESTIONS);
        self.desks.lock().insert(view.clone(), desk);
        let keeper = Keeper::new(view.clone(), endpoints.clone(), self.out.clone(), asks);
        let stop = CancellationToken::new();
        let kept_until = stop.clone().run_until_cancelled_owned(keeper.run());
        self.runtime.spawn(kept_until);
        let stop = stop.drop_guard();
        kept.insert(
            view,
            Kept {
                endpoints,
                _stop: stop,
            },
        );
    }

    /// Stops keeping the views of a worker. Its followers hear nothing more.
    pub fn forget(&self, worker: &WorkerId) {
        self.retain(worker, |_| false);
    }

    /// Stops keeping views of a worker that are not wanted any more.
    pub fn retain(&self, worker: &WorkerId, wanted: impl Fn(u32) -> bool) {
        let gone = |view: &ViewId| view.worker == *worker && !wanted(view.dp_rank);
        self.desks.lock().retain(|view, _| !gone(view));
        self.kept.lock().retain(|view, _| !gone(view));
    }
}
