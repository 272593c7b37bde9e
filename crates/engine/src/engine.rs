//! The handle to a running engine: submit, abort by dropping, utility calls, shut down.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    adapter::Adapter,
    config::Config,
    error::{StartError, SubmitError, UtilityError},
    info::EngineInfo,
    left::end_left,
    live::Refused,
    lockstep::Rank,
    output::RequestKey,
    receive::Shared,
    request::{Lora, Request},
    sink::StepSink,
    start,
    state::{Phase, State},
    validate,
    wire::{self, AddContext},
};

/// Which of the engine's clients we are: the only one. A wrong number mutes the engine.
pub(crate) const CLIENT_INDEX: u32 = 0;

/// A running engine. Cheap to clone; when the last clone is dropped, the engine is let go as by
/// [`Engine::shutdown`], in the background.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) info: EngineInfo,
    pub(crate) limits: validate::Limits,
    pub(crate) shared: Arc<Shared>,
    pub(crate) state: watch::Receiver<State>,
    /// The supervisor ends when this says true, or is dropped.
    pub(crate) stop: watch::Sender<bool>,
    /// Closed when the supervisor has cleared everything away.
    pub(crate) cleared: watch::Receiver<()>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Engine").field(self.info()).finish()
    }
}

impl Engine {
    /// Starts, awaits or adopts the engine that `config` describes, and returns when it takes requests.
    ///
    /// `sink` gets all outputs. Cancel safe: an engine whose start is dropped is ended.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running.
    pub async fn start(config: Config, sink: impl StepSink) -> Result<Self, StartError> {
        let (state, _) = watch::channel(State::Starting(Phase::Preparing));
        Self::start_watched(config, sink, state).await
    }

    /// Like [`Engine::start`], with a state that can be watched while the engine starts.
    ///
    /// # Errors
    /// [`StartError`]; `state` then says nothing more.
    pub async fn start_watched(
        config: Config,
        sink: impl StepSink,
        state: watch::Sender<State>,
    ) -> Result<Self, StartError> {
        let (adapters, run_dir) = (config.adapters.clone(), config.run_dir.clone());
        // Before, so that no engine is started in vain.
        for adapter in &adapters {
            adapter.check().await?;
        }
        let engine = Self(Arc::new(start::start(config, sink, state).await?));
        for adapter in &adapters {
            if let Err(error) = engine.load(adapter).await {
                engine.shutdown().await;
                if let (
                    StartError::Adapter {
                        source: UtilityError::Dead,
                        ..
                    },
                    State::Dead(reason),
                ) = (&error, &*engine.0.state.borrow())
                {
                    return Err(StartError::Died(reason.clone()));
                }
                if !matches!(error, StartError::Adapter { .. })
                    && let Err(error) = end_left(&run_dir).await
                {
                    // It may have read other files than its record says.
                    warn!(%error, "an engine must not be adopted, but is left");
                }
                return Err(error);
            }
        }
        Ok(engine)
    }

    /// Has the engine load an adapter, and makes sure that it read the files that it was to read.
    async fn load(&self, adapter: &Adapter) -> Result<(), StartError> {
        let loaded = self.add_lora(&adapter.lora).await;
        loaded.map_err(|source| StartError::Adapter {
            name: adapter.lora.name.clone(),
            path: adapter.lora.path.clone(),
            source,
        })?;
        adapter.check().await
    }

    /// Has the engine load an adapter, so that a wrong one is known now and the first request need not wait. One of
    /// the same id that is loaded stays as it is.
    async fn add_lora(&self, lora: &Lora) -> Result<(), UtilityError> {
        let argument = self.shared().codec.lora_arg(lora);
        self.utility("add_lora", &[argument]).await?;
        info!(name = lora.name, path = lora.path, "adapter loaded");
        Ok(())
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    /// Returns what the engine said about itself.
    pub fn info(&self) -> &EngineInfo {
        &self.0.info
    }

    /// Returns what requests are checked against.
    pub fn limits(&self) -> &validate::Limits {
        &self.0.limits
    }

    /// Returns the engine's state, to look at or to wait for. Its last value is [`State::Dead`].
    pub fn state(&self) -> watch::Receiver<State> {
        self.0.state.clone()
    }

    /// Checks a request and sends it to the engine.
    ///
    /// The first output may reach the sink before this returns; where the sink must know the key
    /// before, use [`Engine::prepare`].
    ///
    /// # Errors
    /// [`SubmitError`]; the engine then knows nothing of the request.
    pub fn submit(&self, request: Request) -> Result<RequestHandle, SubmitError> {
        self.prepare(request)?.send()
    }

    /// Checks and encodes a request, and gives it its key, but does not send it yet.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] for what must not reach the engine.
    pub fn prepare(&self, request: Request) -> Result<Prepared, SubmitError> {
        let checked = validate::check(request, &self.0.limits)?;
        let key = self.0.shared.live.lock().reserve();
        let engine_id = key.engine_id(&checked.request().id);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let context = AddContext {
            engine_id: &engine_id,
            client_index: CLIENT_INDEX,
            arrival_time: now.as_secs_f64(),
            wave: self.shared().lockstep.as_ref().map_or(0, Rank::wave),
        };
        let payload = self.shared().codec.encode_add(&checked, context);
        Ok(Prepared {
            key,
            engine_id,
            payload,
            shared: self.shared().clone(),
        })
    }

    /// Calls a method of the engine and waits for its result. It runs between two steps, after
    /// everything that was sent before it.
    ///
    /// There is no deadline here. Cancel safe: the call is made all the same, its result dropped.
    ///
    /// # Errors
    /// [`UtilityError::Failed`] with the engine's words; the others if it is gone.
    pub async fn utility(&self, method: &str, args: &[Value]) -> Result<Value, UtilityError> {
        let shared = self.shared();
        let call = shared.utilities.open().ok_or(UtilityError::Dead)?;
        let payload = shared
            .codec
            .encode_utility(CLIENT_INDEX, call.id, method, args);
        shared
            .live
            .lock()
            .send(wire::UTILITY, payload)
            .map_err(|refused| match refused {
                Refused::Dead => UtilityError::Dead,
                Refused::Unsent(unsent) => UtilityError::Unsent(unsent),
            })?;
        match call.answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(message)) => Err(UtilityError::Failed {
                method: method.to_owned(),
                message,
            }),
            Err(_) => Err(UtilityError::Dead),
        }
    }

    /// Lets the engine go and returns when nothing of it is left: live requests are failed, and the
    /// process ends, unless it is kept or was not started by a worker. Does nothing the second time.
    pub async fn shutdown(&self) {
        self.0.stop.send_replace(true);
        let mut cleared = self.0.cleared.clone();
        // Nothing is ever sent: the wait ends when the supervisor is gone.
        while cleared.changed().await.is_ok() {}
    }
}

/// A checked request that has not been sent.
#[must_use = "the request is sent by `send`"]
pub struct Prepared {
    key: RequestKey,
    engine_id: String,
    payload: Bytes,
    shared: Arc<Shared>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Prepared").field(&self.engine_id).finish()
    }
}

impl Prepared {
    /// Returns the key that its outputs will bear.
    pub fn key(&self) -> RequestKey {
        self.key
    }

    /// Sends it.
    ///
    /// # Errors
    /// [`SubmitError::Unsent`] and [`SubmitError::Dead`]; the sink then hears nothing of it.
    pub fn send(self) -> Result<RequestHandle, SubmitError> {
        let Self {
            key,
            engine_id,
            payload,
            shared,
        } = self;
        shared.live.lock().add(key, engine_id, payload)?;
        if let Some(rank) = &shared.lockstep {
            rank.requested();
        }
        Ok(RequestHandle { key, shared })
    }

    /// Sends it and forgets it: for a request that has no output ([`Request::abort_immediately`]).
    ///
    /// # Errors
    /// As [`Prepared::send`].
    pub fn send_unattended(self) -> Result<(), SubmitError> {
        self.shared.live.lock().send(wire::ADD, self.payload)?;
        if let Some(rank) = &self.shared.lockstep {
            rank.requested();
        }
        Ok(())
    }
}

impl From<Refused> for SubmitError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Dead => Self::Dead,
            Refused::Unsent(unsent) => Self::Unsent(unsent),
        }
    }
}

/// A request in the engine. Dropping it aborts the request, if it has not ended by then; the sink may
/// still get outputs that were on their way.
#[must_use = "dropping the handle aborts the request"]
pub struct RequestHandle {
    key: RequestKey,
    shared: Arc<Shared>,
}

impl RequestHandle {
    /// Returns the key that its outputs bear.
    pub fn key(&self) -> RequestKey {
        self.key
    }

    /// Aborts the request, but goes on listening until the handle is dropped: the sink still gets what the
    /// engine had said before it heard of that, if only hand-off parameters that somebody must deal with.
    pub fn stop(&self) {
        self.shared.live.lock().stop(self.key);
    }
}

impl fmt::Debug for RequestHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestHandle").field(&self.key).finish()
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        self.shared.live.lock().cancel(self.key);
    }
}
