//! One engine's side channel: a port that stays free, and where it is noted.

use std::{
    fs, io,
    net::{IpAddr, TcpListener},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::TransferError;

/// Ports that no system serves as "any port" (Linux: 32768 to 60999), so that no connection takes one between
/// here and the engine's start half a minute later.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// Ports tried before giving up.
const TRIES: u32 = 100;

/// What was chosen for a kept engine, in its folder.
const RECORD: &str = "side-channel.json";

/// Where one engine is found by others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Side {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Absent where the engine says it itself.
    pub(crate) engine_id: Option<String>,
    /// The variable that tells the engine its port.
    #[serde(skip, default)]
    pub(super) port_name: &'static str,
}

/// Returns the first of `count` ports in a row that nobody listens on and no other rank has.
pub(super) fn free_ports(host: IpAddr, count: u16, taken: &[Side]) -> Result<u16, TransferError> {
    let mut last = io::ErrorKind::AddrInUse.into();
    for _ in 0..TRIES {
        let first = rand::random_range(PORTS);
        let mut ports = first..first + count;
        if taken.iter().any(|side| ports.contains(&side.port)) {
            continue;
        }
        match ports.try_for_each(|port| TcpListener::bind((host, port)).map(drop)) {
            Ok(()) => return Ok(first),
            Err(error) => last = error,
        }
    }
    Err(TransferError::NoPort { host, source: last })
}

/// Reads what was chosen for the engine that may still run here: another choice would be another engine.
pub(super) fn recorded(
    run_dir: &Path,
    port_name: &'static str,
) -> Result<Option<Side>, TransferError> {
    let path = run_dir.join(RECORD);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TransferError::Record { path, source }),
    };
    // One that cannot be read is of another version, whose engine is not adopted either.
    let side = serde_json::from_slice::<Side>(&text).ok();
    Ok(side.map(|side| Side { port_name, ..side }))
}

/// Notes what was chosen for an engine that is kept.
pub(super) fn record(run_dir: &Path, side: &Side) -> Result<(), TransferError> {
    let path = run_dir.join(RECORD);
    let text = serde_json::to_vec(side).expect("a side channel can be written as JSON");
    fs::create_dir_all(run_dir)
        .and_then(|()| fs::write(&path, text))
        .map_err(|source| TransferError::Record { path, source })
}
