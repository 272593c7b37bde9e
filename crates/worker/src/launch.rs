//! From a worker's configuration to the engines that it starts.

use std::{
    env,
    ffi::OsString,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use stator_common::{WorkerId, card::Role, scratch};
use stator_engine::{
    Attach, Config as EngineConfig, Launch, Simulate, Spawn, Waits, flags::Given, model,
};

use crate::{
    adapters::{self, Adapter, AdapterError, Found},
    cli::EngineKind,
    config::Config,
    kv_events::{KvEvents, KvEventsError},
    network,
    python::on_path,
    transfer::{Transfer, TransferError},
};

/// Why the engines of a worker cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("'{0}' is not an address: expected tcp://host:port")]
    Address(String),
    #[error("port {port} + rank {rank} is no port")]
    Port { port: u16, rank: u32 },
    #[error(
        "stator-sim is neither beside this program nor on the path: name it with --engine-command"
    )]
    NoSimulator,
    #[error(transparent)]
    Adapters(#[from] AdapterError),
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error(transparent)]
    KvEvents(#[from] KvEventsError),
    #[error("create {path}: {source}")]
    RunDir { path: PathBuf, source: io::Error },
    #[error(
        "{ranks} engines of {each} devices need {} devices, but CUDA_VISIBLE_DEVICES={visible} names fewer; they share \
         those with --share-gpus",
        ranks * each
    )]
    Devices {
        ranks: usize,
        each: usize,
        visible: String,
    },
}

/// The engines of a worker.
pub(crate) struct Engines {
    /// One per data-parallel rank.
    pub(crate) configs: Vec<EngineConfig>,
    /// A folder that ends with this worker, if nobody named one.
    pub(crate) run_dir: RunDir,
    /// What each of them serves beside the model.
    pub(crate) adapters: Vec<Adapter>,
    pub(crate) transfer: Transfer,
    pub(crate) kv_events: KvEvents,
}

/// The folder of a worker's engines.
pub(crate) struct RunDir {
    pub(crate) path: PathBuf,
    temporary: bool,
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.temporary {
            // Best effort: it lies below the temporary folder.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Says whether the ranks of a worker step together: those of a mixture of experts do, since its experts are
/// spread over them.
pub(crate) fn steps_together(config: &Config) -> bool {
    let experts = || match model::folder(&config.model) {
        Some(folder) => model::experts(&folder),
        None => config.experts.unwrap_or(0),
    };
    config.data_parallel_size > 1 && config.engine_kind() == EngineKind::Vllm && experts() > 0
}

/// Lays out the engines of a worker.
///
/// - `host`: this machine's address, as other engines reach it.
///
/// # Errors
/// [`LaunchError`].
pub(crate) fn engines(
    config: &Config,
    role: Role,
    worker: &WorkerId,
    host: IpAddr,
) -> Result<Engines, LaunchError> {
    let run_dir = run_dir(config, role, worker)?;
    let ranks = config.data_parallel_size;
    let run_dirs: Vec<PathBuf> = (0..ranks)
        .map(|rank| match ranks {
            1 => run_dir.path.clone(),
            _ => run_dir.path.join(format!("rank-{rank}")),
        })
        .collect();
    let environment = |name: &str| env::var(name).ok();
    let transfer = Transfer::new(config, role, host, &run_dirs, &environment)?;
    let kv_events = KvEvents::new(config, host, &run_dirs)?;
    let adapters = adapters::read(&config.engine_args, &config.names())?;
    let adapters = adapters
        .into_iter()
        .map(Found::hash)
        .collect::<Result<Vec<_>, _>>()?;
    let loaded: Vec<_> = adapters.iter().map(|one| one.loaded.clone()).collect();
    let configs = (0..ranks)
        .zip(run_dirs)
        .map(|(rank, run_dir)| {
            Ok(EngineConfig {
                launch: launch(config, &transfer, &kv_events, rank)?,
                run_dir,
                keep: config.engine_keep,
                dp_rank: rank,
                lockstep: None,
                vocab_size: None,
                adapters: loaded.clone(),
                any_version: config.any_vllm_version,
                waits: Waits {
                    ready: config.engine_ready_timeout,
                    ..Waits::default()
                },
            })
        })
        .collect::<Result<_, LaunchError>>()?;
    Ok(Engines {
        configs,
        run_dir,
        adapters,
        transfer,
        kv_events,
    })
}

fn launch(
    config: &Config,
    transfer: &Transfer,
    kv_events: &KvEvents,
    rank: u32,
) -> Result<Launch, LaunchError> {
    let args = transfer.args(engine_args(config), rank as usize);
    let args = kv_events.args(args, rank as usize);
    let mut env = transfer.env(rank as usize);
    Ok(match config.engine_kind() {
        EngineKind::Attach => {
            let (host, port) = address(config.engine_attach.as_deref().unwrap_or_default())?;
            let port = u16::try_from(u32::from(port) + rank)
                .map_err(|_| LaunchError::Port { port, rank })?;
            Launch::Attach(Attach {
                bind: network::join(&host, port),
                advertise: config.engine_advertise_host.clone(),
                model: model::folder(&config.model),
                args,
            })
        }
        EngineKind::Vllm => Launch::Spawn(Spawn {
            python: config.python.clone().unwrap_or_else(|| "python3".into()),
            model: config.model.clone(),
            args,
            env: {
                let visible = env::var("CUDA_VISIBLE_DEVICES").ok();
                env.extend(devices(config, rank, visible.as_deref())?);
                env
            },
        }),
        EngineKind::Sim => Launch::Simulate(Simulate {
            program: simulator(config)?,
            model: config.model.clone(),
            args,
            env,
        }),
    })
}

/// Returns vLLM's flags: those given, and those of ours that are vLLM's too.
pub(crate) fn engine_args(config: &Config) -> Vec<String> {
    let mut args = config.engine_args.clone();
    if let Some(parser) = &config.reasoning_parser {
        args.extend(["--reasoning-parser".to_owned(), parser.clone()]);
    }
    args
}

/// Gives each of several engines on one machine its devices, as vLLM does for its ranks.
///
/// - `visible`: `CUDA_VISIBLE_DEVICES`, where it is set.
fn devices(
    config: &Config,
    rank: u32,
    visible: Option<&str>,
) -> Result<Vec<(OsString, OsString)>, LaunchError> {
    let ranks = config.data_parallel_size as usize;
    if ranks == 1 {
        return Ok(Vec::new());
    }
    let each = devices_each(&config.engine_args);
    let visible = visible.filter(|list| !list.is_empty());
    let all: Vec<String> = match visible {
        Some(list) => list
            .split(',')
            .map(|device| device.trim().to_owned())
            .collect(),
        // Each takes the first ones by itself.
        None if config.share_gpus => return Ok(Vec::new()),
        None => (0..ranks * each).map(|device| device.to_string()).collect(),
    };
    let needed = if config.share_gpus {
        each
    } else {
        ranks * each
    };
    if all.len() < needed {
        return Err(LaunchError::Devices {
            ranks,
            each,
            visible: visible.unwrap_or_default().to_owned(),
        });
    }
    let own: Vec<&str> = all
        .iter()
        .cycle()
        .skip(rank as usize * each)
        .take(each)
        .map(String::as_str)
        .collect();
    Ok(vec![("CUDA_VISIBLE_DEVICES".into(), own.join(",").into())])
}

/// Returns how many devices one engine takes.
pub(crate) fn devices_each(args: &[String]) -> usize {
    let given = Given::read(args);
    (size(&given, "tensor-parallel-size") * size(&given, "pipeline-parallel-size")) as usize
}

/// Says whether an engine's devices are not all of this machine: they are found by Ray, or other nodes have
/// some.
pub(crate) fn spans_machines(given: &Given<'_>) -> bool {
    size(given, "nnodes") > 1 || given.value("distributed-executor-backend") == Some("ray")
}

/// Reads a count that is 1 where it is not given.
pub(crate) fn size(given: &Given<'_>, name: &str) -> u32 {
    let size = given.value(name).and_then(|size| size.parse().ok());
    size.unwrap_or(1)
}

/// Reads `tcp://host:port` or `host:port`.
pub(crate) fn address(text: &str) -> Result<(String, u16), LaunchError> {
    let bad = || LaunchError::Address(text.to_owned());
    let plain = text.strip_prefix("tcp://").unwrap_or(text);
    let (host, port) = plain.rsplit_once(':').ok_or_else(bad)?;
    let port = port.parse().map_err(|_| bad())?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Err(bad());
    }
    Ok((host.to_owned(), port))
}

fn simulator(config: &Config) -> Result<PathBuf, LaunchError> {
    if let Some(named) = &config.engine_command {
        return Ok(named.clone());
    }
    let beside = env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name("stator-sim"))
        .filter(|file| file.is_file());
    beside
        .or_else(|| on_path("stator-sim", &env::var("PATH").ok()?))
        .ok_or(LaunchError::NoSimulator)
}

fn run_dir(config: &Config, role: Role, worker: &WorkerId) -> Result<RunDir, LaunchError> {
    if let Some(path) = &config.run_dir {
        return Ok(RunDir {
            path: path.clone(),
            temporary: false,
        });
    }
    let place = config.place(role);
    let name = if config.engine_keep {
        // The same again after a restart, so that the engine is found.
        let model: String = Path::new(&config.model)
            .to_string_lossy()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        format!(
            "{}.{}.{}",
            place.namespace,
            place.component,
            model.trim_matches('-')
        )
    } else {
        worker.0.clone()
    };
    let path = scratch::path().join("engines").join(name);
    let failed = |source| LaunchError::RunDir {
        path: path.clone(),
        source,
    };
    scratch::create()
        .and_then(|()| fs::create_dir_all(&path))
        .map_err(failed)?;
    Ok(RunDir {
        path,
        temporary: !config.engine_keep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attached_ranks_listen_on_ports_in_a_row() {
        let config = Config {
            model: "/nowhere".to_owned(),
            engine_attach: Some("tcp://127.0.0.1:4000".to_owned()),
            data_parallel_size: 2,
            ..Config::default()
        };
        let Launch::Attach(attach) =
            launch(&config, &Transfer::default(), &KvEvents::default(), 1).unwrap()
        else {
            panic!("not attached");
        };
        assert_eq!(attach.bind, "127.0.0.1:4001");
    }

    #[test]
    fn an_engine_takes_a_device_for_each_rank_of_both_kinds_of_parallelism() {
        for line in [
            "-tp 2 -pp 2",
            "--tensor-parallel-size=2 --pipeline_parallel_size 2",
            "--tensor-par 4",
        ] {
            let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(devices_each(&args), 4, "{line}");
        }
        assert_eq!(devices_each(&[]), 1);
    }

    #[test]
    fn ranks_of_a_model_that_is_yet_to_be_fetched_step_together_as_they_will_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            model: folder.path().join("m").display().to_string(),
            data_parallel_size: 2,
            experts: Some(8),
            ..Config::default()
        };
        assert!(steps_together(&config));
        config.experts = Some(0);
        assert!(!steps_together(&config));
        fs::create_dir(&config.model).unwrap();
        let file = Path::new(&config.model).join("config.json");
        fs::write(file, r#"{"num_local_experts": 8}"#).unwrap();
        assert!(steps_together(&config));
    }

    #[test]
    fn engines_have_devices_of_their_own_unless_they_are_to_share_them() {
        let own = |share_gpus, visible| {
            let config = Config {
                data_parallel_size: 3,
                share_gpus,
                engine_args: vec!["-tp=2".to_owned()],
                ..Config::default()
            };
            let rank = |rank| {
                let env = devices(&config, rank, visible)?;
                let first = env.into_iter().next();
                Ok(first.map(|(_, value)| value.into_string().unwrap()))
            };
            (0..3)
                .map(rank)
                .collect::<Result<Vec<Option<String>>, LaunchError>>()
        };
        let some = |list: [&str; 3]| list.map(|devices| Some(devices.to_owned())).to_vec();
        assert_eq!(own(false, None).unwrap(), some(["0,1", "2,3", "4,5"]));
        assert!(own(false, Some("a,b")).is_err());
        assert_eq!(
            own(true, Some("a,b,c")).unwrap(),
            some(["a,b", "c,a", "b,c"])
        );
        assert_eq!(own(true, None).unwrap(), [None, None, None]);
        assert!(own(true, Some("a")).is_err());
    }

    #[test]
    fn an_address_without_a_port_is_refused() {
        for text in ["tcp://host", "tcp://:1", "host:x", "tcp://h:70000"] {
            assert!(address(text).is_err(), "{text}");
        }
        assert_eq!(address("tcp://[::1]:5").unwrap(), ("::1".to_owned(), 5));
    }

    #[test]
    fn the_reasoning_parser_goes_to_the_engine_too() {
        let config = Config {
            engine_args: vec!["-O0".to_owned()],
            reasoning_parser: Some("qwen3".to_owned()),
            ..Config::default()
        };
        assert_eq!(engine_args(&config), ["-O0", "--reasoning-parser", "qwen3"]);
    }
}
