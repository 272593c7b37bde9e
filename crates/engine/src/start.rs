//! From a configuration to a running engine: adopt the kept one, or start or await a new one.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};
use tracing::{info, warn};
use zeromq::ZmqError;

use crate::{
    adopt::{self, NotAdopted},
    config::{Attach, Config, Launch, Spawn},
    connected::Connected,
    engine::Inner,
    error::StartError,
    guard::Guard,
    handshake::{Greeted, Handshake, LeadError},
    introspect,
    local::Local,
    logtail::Tail,
    process::{self, Process, ProcessId},
    rundir::{Left, Record, RunDir, Trace},
    schema::{Schema, Untested, check_version},
    sink::StepSink,
    sockets::{Place, Sockets},
    spawn,
    state::{DeadReason, Phase, State},
    wire::Ready,
};

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
    let record = starter.left().await?;
    let connected = match starter.config.launch.clone() {
        Launch::Spawn(spawn) => starter.spawned(&spawn, record).await?,
        Launch::Attach(attach) => starter.attached(&attach, record).await?,
        Launch::Simulate(simulate) => starter.spawned(&simulate.to_spawn(), record).await?,
    };
    let Starter {
        config,
        run_dir,
        state,
        ..
    } = starter;
    connected.run(config, run_dir, state, sink)
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

    /// Returns the record of the engine of before, if that was started the same way and is meant to be
    /// adopted. Any other is ended: this directory is the only one that knows of it.
    async fn left(&self) -> Result<Option<Record>, StartError> {
        let trace = match self.run_dir.load()? {
            Left::Nothing => return Ok(None),
            Left::Record(record) => {
                let kept = record.keep || record.process.is_none();
                if kept && record.fits(&self.config) {
                    return Ok(Some(*record));
                }
                if record.process.is_none() && record.adapters != self.config.adapters {
                    warn!(
                        "the engine of before is not taken back: it loaded other LoRA adapters, or other files of \
                         theirs; end it, and start another one"
                    );
                }
                Trace {
                    process: record.process,
                    host: record.host,
                }
            }
            Left::Trace(trace) => trace,
        };
        if let Some(id) = trace.process {
            info!(
                pid = id.pid,
                "ending the engine of before, if it runs: it was started otherwise"
            );
            self.end(id, &trace.host).await?;
        }
        self.run_dir.forget();
        Ok(None)
    }

    async fn end(&self, id: ProcessId, host: &str) -> Result<(), StartError> {
        let ended = process::end_recorded(id, host, self.config.waits.shutdown).await;
        ended.map_err(|source| StartError::Kept {
            pid: id.pid,
            source,
        })
    }

    /// Adopts the kept engine if there is one, else starts one.
    async fn spawned(
        &self,
        spawn: &Spawn,
        record: Option<Record>,
    ) -> Result<Connected, StartError> {
        if let Some(record) = record {
            match self.adopted(record).await? {
                Some(connected) => return Ok(connected),
                None => self.run_dir.forget(),
            }
        }
        self.launched(spawn).await
    }

    /// Takes over the engine of the record; one that does not answer is ended.
    async fn adopted(&self, record: Record) -> Result<Option<Connected>, StartError> {
        let Some(id) = record.process else {
            return Ok(None);
        };
        let here = record.host.is_empty() || record.host == stator_common::process::host();
        let process = match Process::open(id) {
            Ok(process) if here => process,
            _ => {
                self.end(id, &record.host).await?;
                return Ok(None);
            }
        };
        self.phase(Phase::Adopting);
        let adopted = adopt::adopt(&record, process.ended(), self.config.waits.adopt).await;
        let taken = adopted.and_then(|connected| {
            let tail = Tail::open(&self.run_dir.log(), self.config.dp_rank, true)
                .map_err(NotAdopted::Log)?;
            let guard = (!self.config.keep).then(|| Guard::over(id.pid));
            Ok((
                connected,
                tail,
                guard.transpose().map_err(NotAdopted::Guard)?,
            ))
        });
        match taken {
            Ok((connected, tail, guard)) => Ok(Some(Connected {
                local: Some(Local::adopted(process, tail, guard)),
                ..connected
            })),
            Err(why) => {
                warn!(pid = id.pid, %why, "the kept engine cannot be adopted and is ended");
                process.end_group(self.config.waits.shutdown).await;
                Ok(None)
            }
        }
    }

    /// Starts vLLM and leads it through its handshake.
    async fn launched(&self, spawn: &Spawn) -> Result<Connected, StartError> {
        self.phase(Phase::Launching);
        // A simulator has no Python to ask; it speaks the wire of the version that it names.
        let simulated = matches!(self.config.launch, Launch::Simulate(_));
        let python = (!simulated).then(|| spawn.python.clone());
        let installed = tokio::task::spawn_blocking(move || {
            python
                .map(|python| introspect::introspect(&python))
                .transpose()
        });
        let mut handshake = Handshake::bind("127.0.0.1:0").await?;
        let sockets = bind(Place::Local(self.run_dir.path())).await?;
        let spawn_error = |source| StartError::Spawn {
            python: spawn.python.clone(),
            source,
        };
        let log = self.run_dir.log();
        let program = if simulated { &[][..] } else { &spawn::VLLM };
        let rank = self.config.lockstep.as_ref().map(|all| spawn::Rank {
            number: self.config.dp_rank,
            of: all.ranks(),
        });
        let spawned =
            spawn::spawn(spawn, program, rank, handshake.addr(), &log).map_err(spawn_error)?;
        let tail = Tail::open(&log, self.config.dp_rank, false).map_err(spawn_error)?;
        let mut local = Local::spawned(spawned, tail);
        info!(pid = local.pid(), log = %log.display(), "vLLM started");
        let installed = installed.await.expect("introspection does not panic")?;

        let mut wires = sockets.split();
        let initializing = || self.phase(Phase::Initializing);
        let greeted = tokio::select! {
            greeted = handshake.lead(
                &wires.endpoints,
                self.config.lockstep.as_ref(),
                &mut wires.incoming,
                initializing,
            ) => greeted,
            status = local.ended(|phase| self.phase(phase)) => {
                let log = local.last_words();
                return Err(StartError::Died(DeadReason::Exited { status, log }));
            }
            () = tokio::time::sleep_until(self.deadline) => return Err(self.timed_out()),
        };
        let Greeted { identity, ready } = greeted.map_err(lead_error)?;
        handshake.close().await;
        let schema = self.schema(installed.map(|installed| installed.schema), &ready)?;
        Ok(Connected {
            wires,
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
        let mut handshake = Handshake::bind(&attach.bind).await?;
        let host = handshake.addr().ip();
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
        let mut wires = sockets.split();
        info!(address = %handshake.addr(), "waiting for an engine to dial in");
        let initializing = || self.phase(Phase::Initializing);
        let lockstep = self.config.lockstep.as_ref();
        let greeted = handshake.lead(
            &wires.endpoints,
            lockstep,
            &mut wires.incoming,
            initializing,
        );
        let greeted = timeout_at(self.deadline, greeted)
            .await
            .map_err(|_| self.timed_out())?;
        let Greeted { identity, ready } = greeted.map_err(lead_error)?;
        handshake.close().await;
        let schema = self.schema(None, &ready)?;
        Ok(Connected {
            wires,
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
