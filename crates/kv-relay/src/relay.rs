//! A relay: views of engines, kept and told.

use std::{collections::HashMap, net::IpAddr, net::SocketAddr};

use parking_lot::Mutex;
use stator_common::{
    WorkerId, card,
    events::{ViewId, plane::PlaneError, zmq},
};
use stator_engine::kv_events::Endpoints;
use tokio::sync::mpsc;
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

/// A relay. Dropping it ends it.
pub struct Relay {
    ports: zmq::Ports,
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
    /// - `port`: of what is published; questions come on the next one. 0: two free ones.
    ///
    /// # Errors
    /// [`PlaneError::Listen`].
    pub async fn bind(host: IpAddr, port: u16) -> Result<Self, PlaneError> {
        metrics::describe();
        let outlet = zmq::Outlet::bind(host, port).await?;
        let ports = outlet.ports();
        let (out, outgoing) = mpsc::channel(OUTGOING);
        let desks = Desks::default();
        tokio::spawn(hub::run(outlet, outgoing, desks.clone()));
        Ok(Self {
            ports,
            out,
            desks,
            kept: Mutex::default(),
        })
    }

    /// Returns the bound address of what is published.
    pub fn addr(&self) -> SocketAddr {
        self.ports.news
    }

    /// Returns where followers find this relay.
    ///
    /// - `host`: under which they reach this machine.
    pub fn advertised(&self, host: &str) -> card::Relay {
        self.ports.advertised(host)
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
        tokio::spawn(stop.clone().run_until_cancelled_owned(keeper.run()));
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
