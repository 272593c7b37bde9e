//! A connected engine, and how it becomes one that runs: its record, its two tasks, its handle.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tracing::info;

use crate::{
    config::Config,
    engine::Inner,
    error::StartError,
    info::EngineInfo,
    limits,
    live::Live,
    local::Local,
    receive::{Receiver, Shared},
    rundir::{FORMAT, Fingerprint, Record, RunDir},
    schema::Schema,
    sink::StepSink,
    sockets::{Sender, Wires},
    state::State,
    supervise::Supervisor,
    utilities::Utilities,
    wire::{Codec, Ready},
};

/// A connected engine, before anybody talks to it.
pub(crate) struct Connected {
    pub(crate) wires: Wires,
    /// Its ZMQ identity.
    pub(crate) identity: Bytes,
    pub(crate) ready: Ready,
    pub(crate) schema: Schema,
    /// Its process, if that is ours to look after.
    pub(crate) local: Option<Local>,
    /// How many workers had this engine before.
    pub(crate) life: u32,
}

impl Connected {
    /// Makes it run.
    pub(crate) fn run(
        self,
        config: Config,
        run_dir: RunDir,
        state: watch::Sender<State>,
        sink: impl StepSink,
    ) -> Result<Inner, StartError> {
        let Self {
            wires,
            identity,
            ready,
            schema,
            mut local,
            life,
        } = self;
        let Wires {
            endpoints,
            requests,
            incoming,
            events,
            outputs,
        } = wires;
        let pid = local.as_ref().map(Local::pid);
        let info = EngineInfo::new(&config, &ready, pid, life > 0)?;
        let codec = Arc::new(Codec::new(&schema)?);
        let lockstep = match &config.lockstep {
            Some(lockstep) => Some(lockstep.rank(config.dp_rank, &schema)?),
            None => None,
        };
        let limits = limits::limits(&info, config.launch.args());
        let record = Record {
            format: FORMAT,
            launch: Fingerprint::from(&config.launch),
            adapters: config.adapters.clone(),
            endpoints: endpoints.clone(),
            identity: identity.to_vec(),
            ready,
            schema,
            process: local.as_ref().map(Local::id),
            host: stator_common::process::host(),
            keep: config.keep,
            life,
        };
        if let Err(source) = run_dir.save(&record) {
            return Err(StartError::RunDir {
                path: config.run_dir,
                source,
            });
        }
        if let Some(local) = &mut local {
            local.is_recorded(config.keep);
        }

        let sender = Sender::new(requests, identity.clone());
        let shared = Arc::new(Shared {
            live: Live::new(sender, codec.clone(), life),
            codec,
            utilities: Utilities::new(life),
            heard: Default::default(),
            lockstep,
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
            log: run_dir.log(),
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
