//! The directory of one engine: its endpoints, its log, and the record that outlives the worker.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Attach, Launch, Spawn},
    process::ProcessId,
    schema::Schema,
    wire::Ready,
};

/// What one worker must leave behind for the next one to adopt its engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// How this file is written; another number is not read.
    pub(crate) format: u32,
    /// What was started; an engine that was started otherwise is not adopted.
    pub(crate) launch: Fingerprint,
    pub(crate) endpoints: Endpoints,
    /// The engine's ZMQ identity: its rank as two bytes, little-endian.
    pub(crate) identity: Vec<u8>,
    pub(crate) ready: Ready,
    /// The schema that was used, so that an upgraded installation does not change how the running
    /// engine is spoken to.
    pub(crate) schema: Schema,
    /// vLLM's launcher, the leader of the engine's process group. Absent for an attached engine.
    pub(crate) process: Option<ProcessId>,
    /// Whether it was meant to outlive its worker.
    pub(crate) keep: bool,
    /// How many workers had this engine before.
    pub(crate) life: u32,
}

/// The record's format.
pub(crate) const FORMAT: u32 = 1;

/// Everything that makes two starts the same, verbatim, so that a person can compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Fingerprint {
    Spawn {
        python: String,
        model: String,
        args: Vec<String>,
        env: Vec<(String, String)>,
    },
    Attach {
        bind: String,
        advertise: Option<String>,
    },
}

impl From<&Spawn> for Fingerprint {
    fn from(spawn: &Spawn) -> Self {
        let lossy = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        Self::Spawn {
            python: lossy(spawn.python.as_os_str()),
            model: spawn.model.clone(),
            args: spawn.args.clone(),
            env: spawn
                .env
                .iter()
                .map(|(key, value)| (lossy(key), lossy(value)))
                .collect(),
        }
    }
}

/// Where the engine sends to and reads from; both are bound by us.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Endpoints {
    /// What we bind.
    pub(crate) bind: Pair,
    /// What the engine connects to; differs from `bind` in the host only.
    pub(crate) advertised: Pair,
}

impl From<&Launch> for Fingerprint {
    fn from(launch: &Launch) -> Self {
        match launch {
            Launch::Spawn(spawn) => Self::from(spawn),
            Launch::Attach(attach) => Self::from(attach),
            Launch::Simulate(simulate) => Self::from(&simulate.to_spawn()),
        }
    }
}

impl From<&Attach> for Fingerprint {
    fn from(attach: &Attach) -> Self {
        Self::Attach {
            bind: attach.bind.clone(),
            advertise: attach.advertise.clone(),
        }
    }
}

impl Endpoints {
    /// Waits until the files of closed sockets are gone, so that whoever binds them anew does not lose
    /// his own: the library removes them a moment after it closes.
    pub(crate) async fn wait_until_closed(&self) {
        let gone = async {
            for endpoint in [&self.bind.input, &self.bind.output] {
                let Some(path) = endpoint.strip_prefix("ipc://") else {
                    continue;
                };
                while Path::new(path).exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), gone).await;
    }
}

/// The two ZMQ addresses of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pair {
    /// Ours is a ROUTER: ADD, ABORT, UTILITY.
    pub(crate) input: String,
    /// Ours is a PULL: outputs.
    pub(crate) output: String,
}

/// The directory of one engine, ours alone until this is dropped.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    /// Locked; the lock goes with the process, however it ends.
    _lock: File,
}

impl RunDir {
    /// Creates the directory if it is missing and takes it.
    ///
    /// # Errors
    /// `ResourceBusy` if another process (or another engine of this one) has it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Whoever reaches the sockets in it can make the engine call anything.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)?;
        let path = fs::canonicalize(path)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::ResourceBusy.into()),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("engine.log")
    }

    fn record(&self) -> PathBuf {
        self.path.join("engine.json")
    }

    /// Reads the record of the last engine, if there is a readable one.
    pub(crate) fn load(&self) -> Option<Record> {
        let text = fs::read_to_string(self.record()).ok()?;
        let format = serde_json::from_str::<serde_json::Value>(&text)
            .ok()?
            .get("format")?
            .as_u64();
        if format != Some(u64::from(FORMAT)) {
            return None;
        }
        serde_json::from_str(&text).ok()
    }

    /// Writes the record. A reader sees the old one or the new one, never a part.
    pub(crate) fn save(&self, record: &Record) -> io::Result<()> {
        let temporary = self.path.join("engine.json.new");
        // The engine's extra environment may hold a token.
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(temporary, self.record())
    }

    /// Removes the record: there is nothing to adopt.
    pub(crate) fn forget(&self) {
        let _ = fs::remove_file(self.record());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let pair = Pair {
            input: "ipc:///run/x/in".into(),
            output: "ipc:///run/x/out".into(),
        };
        Record {
            format: FORMAT,
            launch: Fingerprint::Attach {
                bind: "127.0.0.1:29550".into(),
                advertise: None,
            },
            endpoints: Endpoints {
                bind: pair.clone(),
                advertised: pair,
            },
            identity: vec![0, 0],
            ready: Ready::default(),
            schema: Schema::built_in("0.32.0", Default::default()).expect("known"),
            process: Some(ProcessId { pid: 1, started: 2 }),
            keep: true,
            life: 3,
        }
    }

    #[test]
    fn a_record_is_read_back_as_written() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let run_dir = RunDir::open(&dir.path().join("engine-0")).expect("open");
        assert_eq!(run_dir.load(), None);
        run_dir.save(&record()).expect("save");
        assert_eq!(run_dir.load(), Some(record()));
        run_dir.forget();
        assert_eq!(run_dir.load(), None);
    }

    #[test]
    fn a_record_of_another_format_or_a_torn_one_is_not_read() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let run_dir = RunDir::open(dir.path()).expect("open");
        run_dir
            .save(&Record {
                format: FORMAT + 1,
                ..record()
            })
            .expect("save");
        assert_eq!(run_dir.load(), None);
        fs::write(run_dir.record(), "{\"format\": 1").expect("write");
        assert_eq!(run_dir.load(), None);
    }

    #[test]
    fn a_directory_in_use_is_refused() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let first = RunDir::open(dir.path()).expect("open");
        let second = RunDir::open(dir.path()).expect_err("in use");
        assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        RunDir::open(dir.path()).expect("free again");
    }
}
