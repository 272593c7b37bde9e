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
    adapter::Adapter,
    config::{Attach, Config, Launch, Spawn},
    error::StartError,
    process::ProcessId,
    schema::Schema,
    wire::Ready,
};

/// What one worker must leave behind for the next one to adopt its engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// How this file is written; of another number only [`Trace`] is read.
    pub(crate) format: u32,
    /// What was started; an engine that was started otherwise is not adopted.
    pub(crate) launch: Fingerprint,
    /// What it loaded beside the model; with other ones, or other files of theirs, it is not adopted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) adapters: Vec<Adapter>,
    pub(crate) endpoints: Endpoints,
    /// The engine's ZMQ identity: its rank as two bytes, little-endian.
    pub(crate) identity: Vec<u8>,
    pub(crate) ready: Ready,
    /// The schema that was used, so that an upgraded installation does not change how the running
    /// engine is spoken to.
    pub(crate) schema: Schema,
    /// vLLM's launcher, the leader of the engine's process group. Absent for an attached engine.
    pub(crate) process: Option<ProcessId>,
    /// Boot and pid namespace in which `process` names something; empty: unknown.
    #[serde(default)]
    pub(crate) host: String,
    /// Whether it was meant to outlive its worker.
    pub(crate) keep: bool,
    /// How many workers had this engine before.
    pub(crate) life: u32,
}

/// What every format says, under the same names, so that an engine can be ended whose record says things
/// that this version does not know.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Trace {
    // Named so that it must be there, if only as null.
    #[serde(deserialize_with = "Option::deserialize")]
    pub(crate) process: Option<ProcessId>,
    #[serde(default)]
    pub(crate) host: String,
}

/// What a directory says about the engine of before.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Left {
    Nothing,
    Record(Box<Record>),
    /// An engine that cannot be adopted, for its record is written otherwise.
    Trace(Trace),
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

impl Record {
    /// Says whether a start of `config` would give the same engine, so that this one can be adopted for it.
    pub(crate) fn fits(&self, config: &Config) -> bool {
        self.launch == Fingerprint::from(&config.launch) && self.adapters == config.adapters
    }
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

    /// Reads what the last engine's worker left.
    ///
    /// # Errors
    /// There is a record that does not even say which process it is about.
    pub(crate) fn load(&self) -> Result<Left, StartError> {
        let path = self.record();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Left::Nothing),
            Err(source) => return Err(StartError::RunDir { path, source }),
        };
        match serde_json::from_str::<Record>(&text) {
            Ok(record) if record.format == FORMAT => Ok(Left::Record(Box::new(record))),
            _ => serde_json::from_str(&text)
                .map(Left::Trace)
                .map_err(|_| StartError::Record { path }),
        }
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
    use stator_common::BlobHash;

    use super::*;
    use crate::{config::Waits, request::Lora};

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
            adapters: vec![Adapter {
                lora: Lora {
                    name: "x".into(),
                    id: 7,
                    path: "/adapters/x".into(),
                },
                hash: BlobHash::of(b"files"),
            }],
            endpoints: Endpoints {
                bind: pair.clone(),
                advertised: pair,
            },
            identity: vec![0, 0],
            ready: Ready::default(),
            schema: Schema::built_in("0.32.0", Default::default()).expect("known"),
            process: Some(ProcessId { pid: 1, started: 2 }),
            host: "here".to_owned(),
            keep: true,
            life: 3,
        }
    }

    #[test]
    fn a_record_is_read_back_as_written() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let run_dir = RunDir::open(&dir.path().join("engine-0")).expect("open");
        assert_eq!(run_dir.load().expect("no record"), Left::Nothing);
        run_dir.save(&record()).expect("save");
        let left = Left::Record(Box::new(record()));
        assert_eq!(run_dir.load().expect("a record"), left);
        run_dir.forget();
        assert_eq!(run_dir.load().expect("no record"), Left::Nothing);
    }

    #[test]
    fn an_engine_that_read_other_files_of_an_adapter_is_not_adopted() {
        let record = record();
        let config = |adapters| Config {
            launch: Launch::Attach(Attach {
                bind: "127.0.0.1:29550".into(),
                advertise: None,
                model: None,
                args: Vec::new(),
            }),
            run_dir: "/run/x".into(),
            keep: true,
            dp_rank: 0,
            lockstep: None,
            vocab_size: None,
            adapters,
            any_version: false,
            waits: Waits::default(),
        };
        assert!(record.fits(&config(record.adapters.clone())));
        let mut replaced = record.adapters.clone();
        replaced[0].hash = BlobHash::of(b"other files");
        assert!(!record.fits(&config(replaced)));
        // Nor one that loads none now, and might load the same name later.
        assert!(!record.fits(&config(Vec::new())));
    }

    #[test]
    fn whatever_else_a_record_says_its_process_is_known() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let run_dir = RunDir::open(dir.path()).expect("open");
        run_dir
            .save(&Record {
                format: FORMAT + 1,
                ..record()
            })
            .expect("save");
        let trace = Left::Trace(Trace {
            process: record().process,
            host: record().host,
        });
        assert_eq!(run_dir.load().expect("a process"), trace);
        let later = r#"{"process": {"pid": 1, "started": 2, "more": 3}, "host": "here", "new": 0}"#;
        fs::write(run_dir.record(), later).expect("write");
        assert_eq!(run_dir.load().expect("a process"), trace);
    }

    #[test]
    fn a_record_that_names_no_process_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let run_dir = RunDir::open(dir.path()).expect("open");
        for text in ["", "{\"format\": 1", "{\"format\": 1}"] {
            fs::write(run_dir.record(), text).expect("write");
            let error = run_dir.load().expect_err("unreadable").to_string();
            assert!(error.contains("engine.json"), "{error}");
        }
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
