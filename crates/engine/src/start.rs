//! From a configuration to a running engine: adopt the kept one, or start or await a new one.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::channel::mpsc as zmq_mpsc;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout_at},
};
use tracing::{info, warn};
use zeromq::{PullSocket, RouterSendHalf, SocketEvent, ZmqError};

use crate::{
    adopt,
    config::{Attach, Config, Launch, Spawn},
    engine::Inner,
    error::StartError,
    handshake::{Greeted, Handshake, LeadError},
    info::EngineInfo,
    introspect, limits,
    live::Live,
    local::Local,
    logtail::Tail,
    model,
    process::Process,
    receive::{Receiver, Shared},
    rundir::{Endpoints, FORMAT, Fingerprint, Record, RunDir},
    schema::{Schema, Untested, check_version},
    sink::StepSink,
    sockets::{Incoming, Place, Sender, Sockets},
    spawn,
    state::{DeadReason, Phase, State},
    supervise::Supervisor,
    utilities::Utilities,
    wire::{Codec, Ready},
};

/// A connected engine, before anybody talks to it.
pub(crate) struct Connected {
    pub(crate) endpoints: Endpoints,
    pub(crate) requests: RouterSendHalf,
    pub(crate) incoming: Incoming,
    pub(crate) events: zmq_mpsc::Receiver<SocketEvent>,
    pub(crate) outputs: PullSocket,
    pub(crate) identity: Bytes,
    pub(crate) ready: Ready,
    pub(crate) schema: Schema,
    pub(crate) local: Option<Local>,
    /// How many workers had this engine before.
    pub(crate) life: u32,
}

/// What a start carries along.
struct Starter {
    config: Config,
    run_dir: RunDir,
    state: watch::Sender<State>,
    deadline: Instant,
}

/// Starts the engine; see [`crate::Engine::start`].
pub(crate) async fn start(
    config: Config,
    sink: impl StepSink,
    state: watch::Sender<State>,
) -> Result<Inner, StartError> {
    state.send_replace(State::Starting(Phase::Preparing));
    let deadline = Instant::now() + config.waits.ready;
    let run_dir = open_run_dir(&config).await?;
    let starter = Starter {
        config,
        run_dir,
        state,
        deadline,
    };
    let record = starter.run_dir.load();
    let connected = match starter.config.launch.clone() {
        Launch::Spawn(spawn) => starter.spawned(&spawn, record).await?,
        Launch::Attach(attach) => starter.attached(&attach, record).await?,
    };
    starter.run(connected, sink)
}

/// Takes the directory; an engine that died a moment ago may still be clearing it.
async fn open_run_dir(config: &Config) -> Result<RunDir, StartError> {
    let path = || config.run_dir.clone();
    let until = Instant::now() + config.waits.shutdown + Duration::from_secs(5);
    loop {
        match RunDir::open(&config.run_dir) {
            Ok(run_dir) => return Ok(run_dir),
            Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => {
                return Err(StartError::RunDir {
                    path: path(),
                    source: error,
                });
            }
            Err(_) if Instant::now() >= until => {
                return Err(StartError::RunDirInUse { path: path() });
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

impl Starter {
    fn phase(&self, phase: Phase) {
        self.state.send_if_modified(|state| {
            let next = State::Starting(phase);
            let changed = *state != next;
            *state = next;
            changed
        });
    }

    fn untested(&self) -> Untested {
        if self.config.any_version {
            Untested::Allow
        } else {
            Untested::Refuse
        }
    }

    fn timed_out(&self) -> StartError {
        StartError::TimedOut {
            waited: self.config.waits.ready,
        }
    }

    /// Adopts the kept engine if there is one that fits, else starts one.
    async fn spawned(
        &self,
        spawn: &Spawn,
        record: Option<Record>,
    ) -> Result<Connected, StartError> {
        if let Some(record) = record {
            match self.adopted(spawn, record).await {
                Some(connected) => return Ok(connected),
                None => self.run_dir.forget(),
            }
        }
        self.launched(spawn).await
    }

    /// Takes over the engine of the record; one that does not fit or does not answer is ended.
    async fn adopted(&self, spawn: &Spawn, record: Record) -> Option<Connected> {
        let process = Process::open(record.process?).ok()?;
        if !record.keep || record.launch != Fingerprint::from(spawn) {
            info!(
                pid = process.id().pid,
                "ending an engine that was started otherwise"
            );
            process.end_group(self.config.waits.shutdown).await;
            return None;
        }
        self.phase(Phase::Adopting);
        let adopted: Result<Connected, adopt::NotAdopted> =
            adopt::adopt(&record, process.ended(), self.config.waits.adopt).await;
        let connected = adopted.and_then(|connected| {
            let tail = Tail::open(&self.run_dir.log(), self.config.dp_rank, true)?;
            Ok((connected, tail))
        });
        match connected {
            Ok((connected, tail)) => {
                let local = Local::adopted(process, tail, self.config.keep);
                Some(Connected {
                    local: Some(local.ok()?),
                    ..connected
                })
            }
            Err(why) => {
                warn!(pid = process.id().pid, %why, "the kept engine cannot be adopted and is ended");
                process.end_group(self.config.waits.shutdown).await;
                None
            }
        }
    }

    /// Starts vLLM and leads it through its handshake.
    async fn launched(&self, spawn: &Spawn) -> Result<Connected, StartError> {
        self.phase(Phase::Launching);
        let python = spawn.python.clone();
        let installed = tokio::task::spawn_blocking(move || introspect::introspect(&python));
        let mut handshake = Handshake::bind("127.0.0.1:0").await?;
        let sockets = bind(Place::Local(self.run_dir.path())).await?;
        let spawn_error = |source| StartError::Spawn {
            python: spawn.python.clone(),
            source,
        };
        let log = self.run_dir.log();
        let spawned =
            spawn::spawn(spawn, handshake.addr(), &log, self.config.keep).map_err(spawn_error)?;
        let tail = Tail::open(&log, self.config.dp_rank, false).map_err(spawn_error)?;
        let mut local = Local::spawned(spawned, tail);
        info!(pid = local.pid(), log = %log.display(), "vLLM started");
        let installed = installed.await.expect("introspection does not panic")?;

        let Sockets {
            endpoints,
            requests,
            events,
            outputs,
        } = sockets;
        let (requests, mut incoming) = requests.split();
        let greeted = tokio::select! {
            greeted = handshake.lead(&endpoints, &mut incoming, || self.phase(Phase::Initializing)) => greeted,
            status = local.ended(|phase| self.phase(phase)) => {
                let log = local.last_words();
                return Err(StartError::Died(DeadReason::Exited { status, log }));
            }
            () = tokio::time::sleep_until(self.deadline) => return Err(self.timed_out()),
        };
        let Greeted { identity, ready } = greeted.map_err(lead_error)?;
        handshake.close().await;
        let schema = self.schema(Some(installed.schema), &ready)?;
        Ok(Connected {
            endpoints,
            requests,
            incoming,
            events,
            outputs,
            identity,
            ready,
            schema,
            local: Some(local),
            life: 0,
        })
    }

    /// Waits for an engine that somebody else starts, or for the one that was here before.
    async fn attached(
        &self,
        attach: &Attach,
        record: Option<Record>,
    ) -> Result<Connected, StartError> {
        let launch = Fingerprint::from(attach);
        let mut handshake = Handshake::bind(&attach.bind).await?;
        let host = handshake.addr().ip();
        let record = record.filter(|record| record.launch == launch);
        self.phase(Phase::AwaitingEngine);
        if let Some(record) = record {
            // An engine that was here before redials at once. A new one is heard only after that: its
            // HELLO waits in its queue.
            info!(address = %handshake.addr(), "waiting for the engine of before, then for a new one");
            match adopt::adopt(&record, std::future::pending(), self.config.waits.adopt).await {
                Ok(connected) => {
                    handshake.close().await;
                    return Ok(connected);
                }
                Err(why) => info!(%why, "the engine of before is not there"),
            }
        }
        let advertise = match &attach.advertise {
            Some(host) => host.clone(),
            None if host.is_unspecified() => {
                return Err(StartError::NoAdvertisedHost {
                    bind: attach.bind.clone(),
                });
            }
            None => host.to_string(),
        };
        let sockets = bind(Place::Network {
            bind: host,
            advertise: &advertise,
        })
        .await?;
        let Sockets {
            endpoints,
            requests,
            events,
            outputs,
        } = sockets;
        let (requests, mut incoming) = requests.split();
        info!(address = %handshake.addr(), "waiting for an engine to dial in");
        let greeted = handshake.lead(&endpoints, &mut incoming, || {
            self.phase(Phase::Initializing)
        });
        let greeted = timeout_at(self.deadline, greeted)
            .await
            .map_err(|_| self.timed_out())?;
        let Greeted { identity, ready } = greeted.map_err(lead_error)?;
        handshake.close().await;
        let schema = self.schema(None, &ready)?;
        Ok(Connected {
            endpoints,
            requests,
            incoming,
            events,
            outputs,
            identity,
            ready,
            schema,
            local: None,
            life: 0,
        })
    }

    /// Returns the schema of the engine that gave this ready response: the installed one's if that is
    /// the same version, else the built-in table.
    fn schema(&self, installed: Option<Schema>, ready: &Ready) -> Result<Schema, StartError> {
        let version = ready
            .vllm_version
            .clone()
            .ok_or(StartError::ReadyLacks("vllm_version"))?;
        check_version(&version, self.untested())?;
        match installed {
            Some(schema) if schema.vllm_version == version => Ok(schema),
            _ => Ok(Schema::built_in(&version, self.untested())?),
        }
    }

    /// Makes the connected engine run: record, tasks, handle.
    fn run(self, connected: Connected, sink: impl StepSink) -> Result<Inner, StartError> {
        let Self {
            config,
            run_dir,
            state,
            ..
        } = self;
        let Connected {
            endpoints,
            requests,
            incoming,
            events,
            outputs,
            identity,
            ready,
            schema,
            mut local,
            life,
        } = connected;
        let info = info(&config, &ready, local.as_ref(), life)?;
        let codec = Arc::new(Codec::new(&schema)?);
        let limits = limits::limits(&info, args(&config.launch));
        let record = Record {
            format: FORMAT,
            launch: fingerprint(&config.launch),
            endpoints: endpoints.clone(),
            identity: identity.to_vec(),
            ready,
            schema,
            process: local.as_ref().map(Local::id),
            keep: config.keep,
            life,
        };
        let save_error = |source| StartError::RunDir {
            path: config.run_dir.clone(),
            source,
        };
        run_dir.save(&record).map_err(save_error)?;
        if let Some(local) = &mut local {
            local.is_started();
        }

        let shared = Arc::new(Shared {
            live: Live::new(Sender::new(requests, identity.clone()), codec.clone(), life),
            codec,
            utilities: Utilities::new(life),
            heard: Default::default(),
        });
        let (control_sender, control) = mpsc::channel(4);
        let (obituary_sender, obituary) = mpsc::channel(1);
        let (stop, stopped) = watch::channel(false);
        let (cleared_sender, cleared) = watch::channel(());
        state.send_replace(State::Ready);
        let states = state.subscribe();
        let receiver = Receiver {
            outputs,
            shared: shared.clone(),
            control,
            obituary: obituary_sender,
            sink,
        };
        tokio::spawn(receiver.run());
        let supervisor = Supervisor {
            run_dir,
            endpoints,
            identity,
            local,
            keep: config.keep,
            waits: config.waits,
            incoming,
            events,
            shared: shared.clone(),
            control: control_sender,
            obituary,
            stop: stopped,
            state,
        };
        tokio::spawn(async move {
            supervisor.run().await;
            drop(cleared_sender);
        });
        info!(
            vllm = %info.vllm_version, kv_blocks = info.num_gpu_blocks, block_size = info.block_size,
            max_model_len = info.max_model_len, adopted = info.adopted, "engine ready"
        );
        Ok(Inner {
            info,
            limits,
            shared,
            state: states,
            stop,
            cleared,
        })
    }
}

async fn bind(place: Place<'_>) -> Result<Sockets, StartError> {
    Sockets::bind(place).await.map_err(listen_error)
}

fn lead_error(error: LeadError) -> StartError {
    match error {
        LeadError::Socket(source) => listen_error(source),
        LeadError::ReadyResponse(source) => StartError::ReadyResponse(source),
    }
}

fn listen_error(source: ZmqError) -> StartError {
    StartError::Listen {
        address: "its request and output sockets".to_owned(),
        source,
    }
}

fn fingerprint(launch: &Launch) -> Fingerprint {
    match launch {
        Launch::Spawn(spawn) => Fingerprint::from(spawn),
        Launch::Attach(attach) => Fingerprint::from(attach),
    }
}

fn args(launch: &Launch) -> &[String] {
    match launch {
        Launch::Spawn(spawn) => &spawn.args,
        Launch::Attach(attach) => &attach.args,
    }
}

fn info(
    config: &Config,
    ready: &Ready,
    local: Option<&Local>,
    life: u32,
) -> Result<EngineInfo, StartError> {
    let (name, folder) = match &config.launch {
        Launch::Spawn(spawn) => (spawn.model.clone(), model::folder(&spawn.model)),
        Launch::Attach(attach) => (
            attach
                .model
                .as_ref()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            attach.model.clone(),
        ),
    };
    let vocab_size = config
        .vocab_size
        .or_else(|| model::vocab_size(folder.as_deref()?));
    let vocab_size = vocab_size.ok_or(StartError::NoVocabSize { model: name })?;
    Ok(EngineInfo {
        vllm_version: ready
            .vllm_version
            .clone()
            .ok_or(StartError::ReadyLacks("vllm_version"))?,
        max_model_len: ready
            .max_model_len
            .ok_or(StartError::ReadyLacks("max_model_len"))?,
        block_size: ready
            .block_size
            .ok_or(StartError::ReadyLacks("block_size"))?,
        num_gpu_blocks: ready.num_gpu_blocks.unwrap_or(0),
        max_num_seqs: ready.max_num_seqs.unwrap_or(0),
        max_num_batched_tokens: ready.max_num_batched_tokens.unwrap_or(0),
        vocab_size,
        dp_rank: config.dp_rank,
        supports_lora: ready.supports_lora.unwrap_or(false),
        kv_events: ready.kv_events.clone(),
        model: folder,
        pid: local.map(|local| local.pid().cast_unsigned()),
        adopted: life > 0,
    })
}
