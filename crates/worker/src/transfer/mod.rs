//! What the KV connectors of a worker's engines need besides their flag: a side channel for each, by which other
//! engines find it.
//!
//! NIXL's engines listen on `VLLM_NIXL_SIDE_CHANNEL_HOST` and `_PORT` (default `localhost` and 5600 for
//! every engine of a machine), Mooncake's prefill engines on `VLLM_MOONCAKE_BOOTSTRAP_PORT`. What the
//! environment says counts; else each engine gets a free port.

mod side;

use std::{ffi::OsString, io, net::IpAddr, path::PathBuf};

use stator_common::card::{self, HandOffProtocol, Role};
use stator_engine::{
    flags::Given,
    handoff::{Connector, HandOff, Peer, TransferConfig},
};

use crate::{
    config::{Config, ConfigError},
    launch::{engine_args, size, steps_together},
};

use side::{free_ports, record, recorded};

pub(crate) use side::Side;

const HOST: &str = "VLLM_NIXL_SIDE_CHANNEL_HOST";
const PORT: &str = "VLLM_NIXL_SIDE_CHANNEL_PORT";
const BOOTSTRAP_PORT: &str = "VLLM_MOONCAKE_BOOTSTRAP_PORT";

/// UCX's transports on a machine whose engine computes on the CPU: what it would choose by itself needs devices
/// that need not be there.
const UCX_TLS: (&str, &str) = ("UCX_TLS", "tcp,sm,self");

/// By itself vLLM binds the threads of every engine on a CPU to the same cores, and NIXL's with them. Two engines of
/// one machine then keep each other from moving KV for longer than its lease. How many threads each has is not decided
/// here: only whoever starts them all knows (`stator up` divides the cores).
const UNBOUND: (&str, &str) = ("VLLM_CPU_OMP_THREADS_BIND", "nobind");

/// Why the engines' side channels cannot be laid out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("{name}={value} is not a port")]
    Port { name: &'static str, value: String },
    #[error("no free port for an engine's side channel on {host}: {source}")]
    NoPort { host: IpAddr, source: io::Error },
    #[error("{}: {source}", path.display())]
    Record { path: PathBuf, source: io::Error },
    #[error(
        "others find a {connector} engine that was started elsewhere only if this worker knows where it is: set \
         {HOST} and {BOOTSTRAP_PORT} as they are there, and name its `engine_id` in --kv-transfer-config"
    )]
    Elsewhere { connector: &'static str },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The connectors of a worker's engines.
#[derive(Debug, Default)]
pub(crate) struct Transfer {
    config: Option<TransferConfig>,
    handoff: Option<HandOff>,
    /// One per rank; empty where no connector has one.
    pub(crate) sides: Vec<Side>,
    /// What ranks that step together are told, all the same: each makes its own of it.
    base: Option<Base>,
    /// The id of an engine of several nodes, who would otherwise each draw one of their own.
    shared: Option<String>,
    env: Vec<(OsString, OsString)>,
}

/// Of which rank `r` makes `port + r` for NIXL (nixl/base_scheduler.py), and `{engine_id}_dp{r}`
/// (v1/engine/core.py, both 0.32).
#[derive(Debug)]
struct Base {
    port: u16,
    engine_id: Option<String>,
}

impl Transfer {
    /// Lays out the side channels.
    ///
    /// - `host`: this machine's address, as other engines reach it; it can be bound.
    /// - `run_dirs`: the engines' folders, one per rank.
    ///
    /// # Errors
    /// [`TransferError`].
    pub(crate) fn new(
        config: &Config,
        role: Role,
        host: IpAddr,
        run_dirs: &[PathBuf],
        environment: &impl Fn(&str) -> Option<String>,
    ) -> Result<Self, TransferError> {
        let Some(transfer) = config.transfer(role)? else {
            return Ok(Self::default());
        };
        let environment = |name: &str| environment(name).filter(|value| !value.is_empty());
        let handoff = config.handoff(role)?;
        let shared = shared_id(config, role);
        let mooncake = role == Role::Prefill
            && handoff.as_ref().map(|handoff| handoff.connector) == Some(Connector::Mooncake);
        let port_name = match (transfer.has_nixl(), mooncake) {
            (true, _) => PORT,
            (false, true) => BOOTSTRAP_PORT,
            (false, false) => {
                return Ok(Self {
                    config: Some(transfer),
                    handoff,
                    shared,
                    ..Self::default()
                });
            }
        };
        let by_router = handoff.as_ref().is_some_and(|handoff| {
            role == Role::Prefill
                && handoff.connector.protocol() == HandOffProtocol::RouterAllocated
        });
        let elsewhere = config.engine_attach.is_some();
        let named_host = environment(HOST);
        let named_port = match environment(port_name) {
            Some(value) => Some(value.parse::<u16>().map_err(|_| TransferError::Port {
                name: port_name,
                value,
            })?),
            None => None,
        };
        if elsewhere {
            let known = transfer.engine_id().is_some() && named_port.is_some();
            match &handoff {
                Some(handoff) if by_router && !known && !handoff.answers() => {
                    let connector = handoff.connector.name();
                    return Err(TransferError::Elsewhere { connector });
                }
                // What answers says itself where it is.
                _ if !(by_router && known) => {
                    return Ok(Self {
                        config: Some(transfer),
                        handoff,
                        ..Self::default()
                    });
                }
                _ => {}
            }
        }
        let several = run_dirs.len() > 1;
        let named_id = transfer.engine_id().or(shared.as_deref());
        let base = if several && steps_together(config) {
            let ranks = u16::try_from(run_dirs.len()).unwrap_or(u16::MAX);
            Some(Base {
                port: match named_port {
                    Some(first) => first,
                    None => free_ports(host, ranks, &[])?,
                },
                engine_id: by_router.then(|| named_id.map_or_else(random_id, str::to_owned)),
            })
        } else {
            None
        };
        let mut sides = Vec::new();
        for (rank, run_dir) in (0..).zip(run_dirs) {
            if config.engine_keep
                && let Some(side) = recorded(run_dir, port_name)?
            {
                sides.push(side);
                continue;
            }
            let first = base.as_ref().map(|base| base.port).or(named_port);
            let port = match first {
                // Only the first has Mooncake's server, and all use it.
                Some(first) if mooncake && base.is_some() => first,
                Some(first) => first.checked_add(rank).ok_or(TransferError::Port {
                    name: port_name,
                    value: format!("{first} + rank {rank}"),
                })?,
                None => free_ports(host, 1, &sides)?,
            };
            let engine_id = match (&base, named_id) {
                (Some(base), _) => base.engine_id.as_ref().map(|id| format!("{id}_dp{rank}")),
                // As vLLM names its own ranks.
                (None, Some(id)) if several => Some(format!("{id}_dp{rank}")),
                (None, Some(id)) => by_router.then(|| id.to_owned()),
                (None, None) => by_router.then(random_id),
            };
            let side = Side {
                host: named_host.clone().unwrap_or_else(|| host.to_string()),
                port,
                engine_id,
                port_name,
            };
            if config.engine_keep {
                record(run_dir, &side)?;
            }
            sides.push(side);
        }
        let env = transports(config, &transfer, &environment);
        Ok(Self {
            config: Some(transfer),
            handoff,
            sides,
            base,
            shared,
            env,
        })
    }

    /// Puts the connectors of a rank into vLLM's arguments.
    pub(crate) fn args(&self, args: Vec<String>, rank: usize) -> Vec<String> {
        let Some(config) = &self.config else {
            return args;
        };
        let engine_id = match &self.base {
            Some(base) => base.engine_id.as_ref(),
            None => self
                .sides
                .get(rank)
                .and_then(|side| side.engine_id.as_ref()),
        };
        let given = config.engine_id().is_some();
        match engine_id.or(self.shared.as_ref().filter(|_| !given)) {
            Some(id) => config.clone().with_engine_id(id).put_into(&args),
            // As it was given, if it was.
            None if Given::read(&args).has("kv-transfer-config") => args,
            None => config.put_into(&args),
        }
    }

    /// Returns the environment of a rank's engine.
    pub(crate) fn env(&self, rank: usize) -> Vec<(OsString, OsString)> {
        let mut env = self.env.clone();
        if let Some(side) = self.sides.get(rank) {
            if side.port_name == PORT {
                env.push((HOST.into(), side.host.clone().into()));
            }
            let port = self.base.as_ref().map_or(side.port, |base| base.port);
            env.push((side.port_name.into(), port.to_string().into()));
        }
        env
    }

    /// Describes how KV comes or goes, where it does.
    pub(crate) fn card(&self, args: &[String]) -> Option<card::HandOff> {
        let handoff = self.handoff.as_ref()?;
        let given = Given::read(args);
        let size = |name| size(&given, name);
        let tensor = size("tensor-parallel-size");
        let context = size("decode-context-parallel-size");
        let peers = self.sides.iter().filter_map(|side| {
            let params = handoff.peer(&Peer {
                engine_id: side.engine_id.as_deref()?,
                host: &side.host,
                port: side.port,
                tensor_parallel_size: tensor.max(context),
                pipeline_parallel_size: size("pipeline-parallel-size"),
                decode_context_parallel_size: context,
            })?;
            Some(params.iter().map(|byte| format!("{byte:02x}")).collect())
        });
        Some(card::HandOff {
            connector: handoff.connector.name().to_owned(),
            protocol: handoff.connector.protocol(),
            tensor_parallel_size: tensor,
            lease_ms: u64::try_from(handoff.lease.as_millis()).unwrap_or(u64::MAX),
            peers: peers.collect(),
        })
    }
}

/// Returns the id of an engine of several nodes, from what all of them are told alike: where they meet. The agents of
/// all devices must have the id that its scheduler tells (nixl/base_worker.py, 0.32), and vLLM draws one in each
/// process (config/kv_transfer.py).
fn shared_id(config: &Config, role: Role) -> Option<String> {
    let given = Given::read(&config.engine_args);
    if size(&given, "nnodes") < 2 {
        return None;
    }
    // vLLM's defaults (config/parallel.py).
    let address = given.value("master-addr").unwrap_or("127.0.0.1");
    let port = given.value("master-port").unwrap_or("29501");
    Some(format!("stator-{role}-{address}-{port}"))
}

fn random_id() -> String {
    format!("stator-{:016x}", rand::random::<u64>())
}

/// Returns vLLM's arguments for a further node of an engine, whose connectors are those of the first.
///
/// # Errors
/// [`TransferError::Config`].
pub(crate) fn node_args(config: &Config, role: Role) -> Result<Vec<String>, TransferError> {
    let transfer = Transfer {
        config: config.transfer(role)?,
        shared: shared_id(config, role),
        ..Transfer::default()
    };
    Ok(transfer.args(engine_args(config), 0))
}

/// Returns the environment of a further node of an engine.
///
/// # Errors
/// [`TransferError::Config`].
pub(crate) fn node_env(
    config: &Config,
    role: Role,
) -> Result<Vec<(OsString, OsString)>, TransferError> {
    let environment = |name: &str| std::env::var(name).ok();
    let transfer = config.transfer(role)?;
    Ok(transfer.map_or_else(Vec::new, |transfer| {
        transports(config, &transfer, &environment)
    }))
}

fn transports(
    config: &Config,
    transfer: &TransferConfig,
    environment: &impl Fn(&str) -> Option<String>,
) -> Vec<(OsString, OsString)> {
    let cpu = config.vllm.as_ref().is_some_and(|vllm| vllm.is_cpu());
    if !cpu || !transfer.has_nixl() {
        return Vec::new();
    }
    [UCX_TLS, UNBOUND]
        .into_iter()
        .filter(|(name, _)| environment(name).is_none())
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

#[cfg(test)]
mod tests;
