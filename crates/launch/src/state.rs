//! What a running topology leaves on disk, so that `stator status` finds it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stator_common::{process::start_of, scratch};

/// A topology that runs, as written by its launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Topology {
    pub(crate) name: String,
    pub(crate) launcher_pid: u32,
    /// When it started, as [`start_of`] says: another process may have its pid later.
    #[serde(default)]
    pub(crate) launcher_started: Option<u64>,
    pub(crate) model: String,
    /// Base URL of the OpenAI API.
    pub(crate) url: String,
    pub(crate) processes: Vec<Process>,
}

/// One child of a topology.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Process {
    /// `processor`, `agg-0`, ...
    pub(crate) name: String,
    pub(crate) role: String,
    /// Absent while it does not run.
    pub(crate) pid: Option<u32>,
    /// Base URL of its health, status and metrics routes, while it runs.
    pub(crate) system_url: Option<String>,
    pub(crate) log: PathBuf,
    /// Its own; empty where it sees all there are.
    #[serde(default)]
    pub(crate) gpus: Vec<String>,
    /// What becomes of it, where it does not say so itself.
    #[serde(default)]
    pub(crate) note: Option<String>,
}

/// Returns the folder that holds all topologies of this user, created with mode 0700.
///
/// # Errors
/// When somebody else can write to the folder: its files decide which processes we talk to.
pub(crate) fn root(given: Option<&Path>) -> io::Result<PathBuf> {
    let Some(root) = given else {
        scratch::create()?;
        return Ok(scratch::path());
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)?;
    let data = fs::metadata(root)?;
    let ours = data.uid() == nix::unistd::Uid::effective().as_raw();
    if !ours || data.permissions().mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("others than this user can write to {}", root.display()),
        ));
    }
    Ok(root.to_path_buf())
}

/// Creates the folder of one topology with mode 0700.
pub(crate) fn create(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

impl Topology {
    /// Writes the file that `status` reads, by rename, so that a reader never sees half of it.
    pub(crate) fn save(&self, dir: &Path) -> io::Result<()> {
        let tmp = dir.join("topology.json.tmp");
        fs::write(&tmp, serde_json::to_vec_pretty(self)?)?;
        fs::rename(tmp, dir.join("topology.json"))
    }

    /// Removes the file; a topology that ended is not shown.
    pub(crate) fn remove(dir: &Path) {
        let _ = fs::remove_file(dir.join("topology.json"));
    }

    /// Reads the topology under `dir`, if its launcher is alive.
    pub(crate) fn load(dir: &Path) -> Option<Topology> {
        let bytes = fs::read(dir.join("topology.json")).ok()?;
        let topology: Topology = serde_json::from_slice(&bytes).ok()?;
        let alive = start_of(topology.launcher_pid)?;
        (topology.launcher_started == Some(alive)).then_some(topology)
    }

    /// Reads every live topology under `root`, sorted by name.
    pub(crate) fn load_all(root: &Path) -> Vec<Topology> {
        let mut all: Vec<Topology> = fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Topology::load(&entry.path()))
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(pid: u32) -> Topology {
        Topology {
            name: "t".into(),
            launcher_pid: pid,
            launcher_started: start_of(pid),
            model: "m".into(),
            url: "http://127.0.0.1:8000".into(),
            processes: vec![],
        }
    }

    #[test]
    fn a_topology_whose_launcher_lives_is_found_and_a_dead_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let (live, dead) = (root.path().join("live"), root.path().join("dead"));
        fs::create_dir_all(&live).unwrap();
        fs::create_dir_all(&dead).unwrap();
        topology(std::process::id()).save(&live).unwrap();
        // Pids stop below 2^22, so this one cannot exist.
        topology(1 << 30).save(&dead).unwrap();
        let found = Topology::load_all(root.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].launcher_pid, std::process::id());
        // Another process with the pid of a launcher that ended.
        let mut reused = topology(std::process::id());
        reused.launcher_started = reused.launcher_started.map(|ticks| ticks - 1);
        reused.save(&live).unwrap();
        assert!(Topology::load_all(root.path()).is_empty());
    }

    #[test]
    fn a_folder_that_others_can_write_to_holds_no_topologies() {
        let dir = tempfile::tempdir().unwrap();
        assert!(root(Some(dir.path())).is_ok());
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(root(Some(dir.path())).is_err());
    }
}
