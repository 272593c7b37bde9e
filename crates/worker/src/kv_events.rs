//! What a worker's engines tell of their KV caches: switched on where it is wanted, and heard by a relay in this process
//! or by the one of this machine.
//!
//! An engine publishes into files of its own folder, which only this machine's relays can reach, unless ports are asked
//! for. What `--kv-events-config` says counts more.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use stator_common::{
    WorkerId, card,
    events::{self, ViewId},
    nats::Nats,
    process,
};
use stator_engine::kv_events::{Endpoints, Publisher};
use stator_kv_relay::{
    Place, Relay,
    config::{PORT as RELAY_PORT, node_name},
};
use tracing::warn;

use crate::{
    cli::{EventPlane, KvRelay},
    config::{Config, ConfigError},
    handler::Serving,
    launch, network,
    rank::Active,
};

/// `sockaddr_un.sun_path` holds 108 bytes, one of them the terminating zero; names in an engine's folder have up to 25.
const MAX_FOLDER: usize = 107 - 25;

/// Why engines cannot publish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvEventsError {
    #[error(
        "{} is too long for a socket's name: choose another --run-dir, or ports with --kv-event-port", .0.display()
    )]
    Folder(PathBuf),
    #[error("--kv-event-port {port}: {ranks} ranks need {} ports from there on", ranks * 2)]
    Ports { port: u16, ranks: u32 },
    #[error("--kv-event-port {port}: port {taken} is the one of {of} already")]
    Taken {
        port: u16,
        taken: u16,
        of: &'static str,
    },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The KV events of a worker's engines.
#[derive(Default)]
pub(crate) struct KvEvents {
    /// One per rank; empty where none is wanted.
    publishers: Vec<Publisher>,
    /// Whether vLLM's flag is there already.
    given: bool,
    /// Whether the engines know their ranks, and add them to their endpoints.
    ranked: bool,
    /// Ports that engines will bind on this machine.
    pub(crate) ports: Vec<u16>,
    /// The relay in this process, or where that of this machine is.
    relay: Option<Heard>,
}

/// Who hears the engines.
enum Heard {
    Here(Relay, card::Relay),
    ByNode(card::Relay),
}

impl KvEvents {
    /// Lays out where engines publish.
    ///
    /// - `host`: this machine's address, as others reach it.
    /// - `run_dirs`: the engines' folders, one per rank.
    ///
    /// # Errors
    /// [`KvEventsError`].
    pub(crate) fn new(
        config: &Config,
        host: IpAddr,
        run_dirs: &[PathBuf],
    ) -> Result<Self, KvEventsError> {
        let given = config.kv_events()?;
        let ranked = launch::steps_together(config);
        if let Some(publisher) = given {
            return Ok(Self {
                publishers: match publisher.publishes() {
                    true => vec![publisher; run_dirs.len()],
                    false => Vec::new(),
                },
                given: true,
                ranked,
                ..Self::default()
            });
        }
        let wanted = config.kv_relay != KvRelay::Off || config.enable_kv_events;
        if !wanted {
            return Ok(Self::default());
        }
        let mut ports = Vec::new();
        let publishers = match config.kv_event_port {
            Some(first) => {
                let ranks = config.data_parallel_size;
                ports = row(config, first, ranks)?;
                let open = !host.is_loopback();
                let host = (!open).then_some(Ipv4Addr::LOCALHOST);
                let at = |rank: usize| {
                    // Engines that know their ranks count for themselves.
                    let rank = if ranked { 0 } else { rank };
                    Publisher::on_ports(host, ports[rank], ports[ranks as usize + rank])
                };
                (0..run_dirs.len()).map(at).collect()
            }
            None => run_dirs
                .iter()
                .map(|folder| in_files(folder))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            publishers,
            given: false,
            ranked,
            ports,
            relay: None,
        })
    }

    /// Binds the relay of this process, or finds that of this machine, if the configuration wants one.
    ///
    /// - `nats`: for the event plane of that name; there `id` is what the relay is called.
    /// - `bind`: the address that the worker listens on.
    /// - `advertised`: host under which others reach it.
    ///
    /// # Errors
    /// The relay's ports cannot be bound; its address is none; there is no NATS server.
    pub(crate) async fn start_relay(
        &mut self,
        config: &Config,
        nats: &Nats,
        id: &WorkerId,
        bind: IpAddr,
        advertised: &str,
    ) -> anyhow::Result<()> {
        self.relay = match config.kv_relay {
            KvRelay::Off => None,
            KvRelay::Embedded => {
                let place = match config.event_plane() {
                    EventPlane::Zmq => Place::Zmq {
                        host: bind,
                        port: config.kv_relay_port,
                    },
                    EventPlane::Nats => Place::Nats {
                        nats: nats.clone(),
                        name: id.0.clone(),
                    },
                };
                let relay = Relay::bind_apart(place).await?;
                let at = relay.advertised(advertised);
                Some(Heard::Here(relay, at))
            }
            KvRelay::Node => {
                let (host, port) = match &config.kv_relay_address {
                    Some(address) => launch::address(address)?,
                    None => (advertised.to_owned(), RELAY_PORT),
                };
                if config.event_plane() == EventPlane::Nats {
                    // It listens nowhere, and is told from others by the port that it was given.
                    let relay = events::nats::advertised(&node_name(port));
                    self.relay = Some(Heard::ByNode(relay));
                    return Ok(());
                }
                let at = |port: u16| format!("tcp://{}", network::join(&host, port));
                Some(Heard::ByNode(card::Relay {
                    endpoint: at(port),
                    snapshot_endpoint: at(port.wrapping_add(1)),
                }))
            }
        };
        Ok(())
    }

    /// Returns the address of the relay in this process, if it has one of its own.
    pub(crate) fn relay_addr(&self) -> Option<std::net::SocketAddr> {
        match &self.relay {
            Some(Heard::Here(relay, _)) => relay.addr(),
            Some(Heard::ByNode(_)) | None => None,
        }
    }

    /// Puts where a rank publishes into vLLM's arguments.
    pub(crate) fn args(&self, args: Vec<String>, rank: usize) -> Vec<String> {
        match self.publishers.get(rank) {
            Some(publisher) if !self.given => publisher.put_into(&args),
            // As it was given, if it was.
            Some(_) | None => args,
        }
    }

    /// Has the relay of this process hear the engines that run.
    pub(crate) fn listen(&self, worker: &WorkerId, serving: &Serving) {
        let Some(Heard::Here(relay, _)) = &self.relay else {
            return;
        };
        for active in serving.active() {
            match self.endpoints(&active) {
                Some(endpoints) => {
                    let view = ViewId {
                        worker: worker.clone(),
                        dp_rank: active.rank,
                    };
                    relay.keep(view, endpoints);
                }
                None => warn!(
                    rank = active.rank,
                    "the engine publishes no KV events: what it caches is not known"
                ),
            }
        }
    }

    /// Returns where an engine is heard, if it publishes.
    fn endpoints(&self, active: &Active) -> Option<Endpoints> {
        let resolved = active.engine.info().kv_events.as_ref();
        let rank = if self.ranked { active.rank } else { 0 };
        // Relays are on the engine's machine.
        let host = Ipv4Addr::LOCALHOST.to_string();
        match self.publishers.get(active.rank as usize) {
            Some(publisher) => Some(publisher.endpoints(resolved, rank, &host)),
            // One that was started elsewhere may publish as its own flags say.
            None => Publisher::resolved(resolved?, &host),
        }
    }

    /// Describes where it is told what the engines' caches hold, if it is.
    pub(crate) fn card(&self, serving: &Serving) -> Option<card::KvEvents> {
        let engines = || {
            serving
                .active()
                .filter_map(|active| {
                    let endpoints = self.endpoints(&active)?;
                    Some(card::EngineEvents {
                        dp_rank: active.rank,
                        host: process::machine(),
                        endpoint: endpoints.events,
                        replay_endpoint: endpoints.replay,
                        topic: endpoints.topic,
                    })
                })
                .collect::<Vec<_>>()
        };
        let (relay, engines) = match &self.relay {
            Some(Heard::Here(_, at)) => (Some(at.clone()), Vec::new()),
            Some(Heard::ByNode(at)) => (Some(at.clone()), engines()),
            None => (None, engines()),
        };
        (relay.is_some() || !engines.is_empty()).then_some(card::KvEvents { relay, engines })
    }
}

fn in_files(folder: &Path) -> Result<Publisher, KvEventsError> {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    match absolute.to_str() {
        Some(text) if absolute.as_os_str().as_bytes().len() <= MAX_FOLDER => {
            Ok(Publisher::in_files(text))
        }
        _ => Err(KvEventsError::Folder(absolute)),
    }
}

/// Returns the ports of so many ranks: first where each publishes, then where each tells again.
fn row(config: &Config, first: u16, ranks: u32) -> Result<Vec<u16>, KvEventsError> {
    let error = || KvEventsError::Ports { port: first, ranks };
    let last = u32::from(first) + 2 * ranks - 1;
    let last = u16::try_from(last).map_err(|_| error())?;
    if first == 0 {
        return Err(error());
    }
    let attach = config.engine_attach.as_deref().map(launch::address);
    let attach = attach.and_then(Result::ok).map(|(_, port)| port);
    let attach = (0..ranks).filter_map(|rank| attach?.checked_add(u16::try_from(rank).ok()?));
    let relay = config.kv_relay_port;
    let others = [
        (config.port, "--port"),
        (
            u16::try_from(config.system_port).unwrap_or(0),
            "--system-port",
        ),
        (relay, "--kv-relay-port"),
        (relay.wrapping_add(u16::from(relay > 0)), "--kv-relay-port"),
    ];
    let attach = attach.map(|port| (port, "--engine-attach"));
    for (taken, of) in others.into_iter().chain(attach) {
        if (first..=last).contains(&taken) {
            return Err(KvEventsError::Taken {
                port: first,
                taken,
                of,
            });
        }
    }
    Ok((first..=last).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config {
            kv_relay: KvRelay::Embedded,
            data_parallel_size: 2,
            ..Config::default()
        };
        change(&mut config);
        config
    }

    fn events(config: &Config, host: IpAddr) -> Result<KvEvents, KvEventsError> {
        KvEvents::new(config, host, &["/run/a".into(), "/run/b".into()])
    }

    fn args(config: &Config, rank: usize) -> String {
        let events = events(config, LOOPBACK).unwrap();
        events.args(config.engine_args.clone(), rank).join(" ")
    }

    #[test]
    fn engines_publish_where_only_their_machine_can_listen() {
        let line = args(&config(|_| {}), 1);
        assert!(line.contains("ipc:///run/b/"), "{line}");
        let ports = config(|config| config.kv_event_port = Some(7000));
        let line = args(&ports, 1);
        assert!(
            line.contains("127.0.0.1:7001") && line.contains("127.0.0.1:7003"),
            "{line}"
        );
        let events = events(&ports, [10, 0, 0, 1].into()).unwrap();
        let open = events.args(Vec::new(), 0).join(" ");
        assert!(
            open.contains("tcp://*:7000") && open.contains("tcp://*:7002"),
            "{open}"
        );
        assert_eq!(events.ports, [7000, 7001, 7002, 7003]);
    }

    #[test]
    fn nothing_is_published_unless_it_is_wanted() {
        let off = |wanted| {
            config(|config| {
                config.kv_relay = KvRelay::Off;
                config.enable_kv_events = wanted;
            })
        };
        assert_eq!(args(&off(false), 0), "");
        assert!(args(&off(true), 0).contains("--kv-events-config"));
    }

    #[test]
    fn what_was_given_stays_as_it_is() {
        let given =
            "--kv-events-config={\"enable_kv_cache_events\":true,\"endpoint\":\"tcp://*:9\"}";
        let config = config(|config| config.engine_args = vec![given.to_owned()]);
        assert_eq!(args(&config, 1), given);
    }

    #[test]
    fn ports_that_do_not_fit_or_are_others_are_refused() {
        let refused = |change: fn(&mut Config)| events(&config(change), LOOPBACK).err();
        assert!(matches!(
            refused(|config| config.kv_event_port = Some(65_533)),
            Some(KvEventsError::Ports { .. })
        ));
        let taken = refused(|config| {
            config.kv_event_port = Some(7000);
            config.system_port = 7003;
        });
        assert!(matches!(
            taken,
            Some(KvEventsError::Taken { taken: 7003, .. })
        ));
        let folder = PathBuf::from(format!("/{}", "x".repeat(100)));
        let long = KvEvents::new(&config(|_| {}), LOOPBACK, &[folder]);
        assert!(matches!(long, Err(KvEventsError::Folder(_))));
    }
}
