//! LoRA adapters, as vLLM's `--lora-modules` names them.
//!
//! To a headless engine that flag means nothing: vLLM's own server acts on it. So the worker reads it, has each
//! engine load the adapters before it serves (`stator_engine::Config::adapters`), and tells processors their names.
//! What cannot work is refused here, half a minute before an engine would say it. Adapters do not come or go later.
//!
//! Nor do their files change: what they held at the start is what processors are told, what an engine must have loaded to
//! be adopted, and what a restarted one must find. Not noticed is an engine that keeps fewer adapters than it serves
//! (`--max-cpu-loras`) and reads replaced files when it takes one up again, nor an attached one that sees other files at
//! the same path.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;
use stator_common::{BlobHash, card};
use stator_engine::{
    Lora,
    adapter::{self, CONFIG},
    flags::Given,
    model,
};

/// What `--max-lora-rank` may be, and what it is if it is not given (vLLM 0.32, config/lora.py).
const RANKS: [u64; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
const DEFAULT_RANK: u64 = 16;

/// Why `--lora-modules` is refused.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(
        "--lora-modules '{text}': expected NAME=PATH, or a JSON object with \"name\" and \"path\" ({reason})"
    )]
    Spelling { text: String, reason: String },
    #[error(
        "--lora-modules names adapters, and the engine runs without LoRA: say --enable-lora, too"
    )]
    Off,
    #[error(
        "--lora-modules calls two adapters '{0}': give each a name of its own, under which clients ask for it"
    )]
    Twice(String),
    #[error(
        "--lora-modules calls an adapter '{0}', which is a name of the model: give it another one, or the model \
         (--served-model-name)"
    )]
    NamedAsModel(String),
    #[error(
        "--lora-modules {name}={path}: there is no {CONFIG} in that folder, and no repository of that name in the \
         Hugging Face cache: name the adapter's folder, or fetch it first (hf download {path})"
    )]
    NoFolder { name: String, path: String },
    #[error("--lora-modules {name}: {}: {reason}", path.display())]
    Config {
        name: String,
        path: PathBuf,
        reason: String,
    },
    #[error(
        "--lora-modules {name}: the adapter has rank {rank}, and engines take up to {most}{}",
        fitting(*.rank)
    )]
    Rank { name: String, rank: u64, most: u64 },
    #[error(
        "--max-lora-rank '{0}' is not a number: say the largest rank of the adapters, or one above"
    )]
    MostRank(String),
    #[error("--lora-modules {name}={path}: its files cannot be read: {source}")]
    Files {
        name: String,
        path: String,
        source: io::Error,
    },
}

fn fitting(rank: u64) -> String {
    let fitting = RANKS.iter().find(|most| **most >= rank);
    fitting.map_or_else(String::new, |most| format!(": say --max-lora-rank {most}"))
}

/// An adapter that could be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    lora: Lora,
    /// The name of the model that it adapts.
    parent: String,
}

/// An adapter that a worker serves, with the files of when it started and no others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Adapter {
    /// What its engines load.
    pub(crate) loaded: adapter::Adapter,
    parent: String,
}

/// An adapter as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Module {
    name: String,
    path: String,
    base_model_name: Option<String>,
}

/// Reads the adapters among vLLM's flags.
///
/// - `names`: of the model.
///
/// # Errors
/// [`AdapterError`].
pub(crate) fn read(args: &[String], names: &[String]) -> Result<Vec<Found>, AdapterError> {
    let given = Given::read(args);
    let most = match given.value("max-lora-rank") {
        Some(text) => text
            .parse()
            .map_err(|_| AdapterError::MostRank(text.to_owned()))?,
        None => DEFAULT_RANK,
    };
    let mut adapters: Vec<Found> = Vec::new();
    for text in given.values("lora-modules").filter(|text| !text.is_empty()) {
        let Module {
            name,
            path,
            base_model_name,
        } = module(text)?;
        if !given.has("enable-lora") {
            return Err(AdapterError::Off);
        }
        if names.contains(&name) {
            return Err(AdapterError::NamedAsModel(name));
        }
        if adapters.iter().any(|other| other.lora.name == name) {
            return Err(AdapterError::Twice(name));
        }
        let folder = folder(&name, path)?;
        check_rank(&name, &folder, most)?;
        let path = folder.display().to_string();
        // As in vLLM, a base that is not served counts for nothing.
        let parent = base_model_name.filter(|base| names.contains(base));
        adapters.push(Found {
            parent: parent
                .or_else(|| names.first().cloned())
                .unwrap_or_default(),
            lora: Lora {
                id: id(&name, &path),
                name,
                path,
            },
        });
    }
    Ok(adapters)
}

/// Reads one value, as vLLM does (0.32, `LoRAParserAction`).
fn module(text: &str) -> Result<Module, AdapterError> {
    let bad = |reason: String| AdapterError::Spelling {
        text: text.to_owned(),
        reason,
    };
    let module = match text.split_once('=') {
        Some((name, path)) if !text.contains(',') => Module {
            name: name.to_owned(),
            path: path.to_owned(),
            base_model_name: None,
        },
        _ => serde_json::from_str(text).map_err(|error| bad(error.to_string()))?,
    };
    if module.name.is_empty() || module.path.is_empty() {
        return Err(bad("name and path must not be empty".to_owned()));
    }
    Ok(module)
}

fn folder(name: &str, path: String) -> Result<PathBuf, AdapterError> {
    model::adapter_folder(&path).ok_or_else(|| AdapterError::NoFolder {
        name: name.to_owned(),
        path,
    })
}

fn check_rank(name: &str, folder: &Path, most: u64) -> Result<(), AdapterError> {
    let path = folder.join(CONFIG);
    let bad = |reason: String| AdapterError::Config {
        name: name.to_owned(),
        path: path.clone(),
        reason,
    };
    let text = fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    let config: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let rank = config.get("r").and_then(Value::as_u64);
    match rank.ok_or_else(|| bad("it does not say the adapter's rank (`r`)".to_owned()))? {
        rank if rank > most => Err(AdapterError::Rank {
            name: name.to_owned(),
            rank,
            most,
        }),
        _ => Ok(()),
    }
}

/// Returns an id that an adapter has in every life of a worker, as an engine that is adopted must be asked by. It says
/// nothing of the files: no engine is adopted that read other ones ([`stator_engine::Config::adapters`]).
fn id(name: &str, path: &str) -> u32 {
    let hash = BlobHash::of(format!("{name}\0{path}").as_bytes());
    let bits = u32::from_str_radix(&hash.0[..8], 16).expect("a hash is written in hex");
    // The engine wants it positive, and keeps it in 32 bits with a sign in places.
    (bits >> 1).max(1)
}

impl Found {
    /// Reads all of the adapter's files.
    ///
    /// # Errors
    /// [`AdapterError::Files`].
    pub(crate) fn hash(self) -> Result<Adapter, AdapterError> {
        let Self { lora, parent } = self;
        let (name, path) = (lora.name.clone(), lora.path.clone());
        match adapter::Adapter::read(lora) {
            Ok(loaded) => Ok(Adapter { loaded, parent }),
            Err(source) => Err(AdapterError::Files { name, path, source }),
        }
    }
}

impl Adapter {
    /// Returns what processors are told of it.
    pub(crate) fn card(&self) -> card::Adapter {
        let lora = &self.loaded.lora;
        card::Adapter {
            name: lora.name.clone(),
            root: lora.path.clone(),
            parent: self.parent.clone(),
            hash: self.loaded.hash.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use stator_engine::adapter::WEIGHTS;

    use super::*;

    fn adapter(rank: u64) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let config = format!("{{\"r\": {rank}}}");
        fs::write(folder.path().join(CONFIG), config).unwrap();
        fs::write(folder.path().join(WEIGHTS[0]), "weights").unwrap();
        folder
    }

    fn from(args: &[&str]) -> Result<Vec<Found>, AdapterError> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        read(&args, &["m".to_owned(), "alias".to_owned()])
    }

    #[test]
    fn both_spellings_are_read_and_ids_stay() {
        let folder = adapter(8);
        let path = folder.path().display().to_string();
        let plain = format!("x={path}");
        let json =
            |base| format!("{{\"name\":\"y\",\"path\":\"{path}\",\"base_model_name\":\"{base}\"}}");
        let (alias, unknown) = (json("alias"), json("nobody"));
        let both = from(&["--enable-lora", "--lora-modules", &plain, &alias]).unwrap();
        let known: Vec<_> = both
            .iter()
            .map(|one| (&one.lora.name[..], &one.parent[..]))
            .collect();
        assert_eq!(known, [("x", "m"), ("y", "alias")]);
        assert_ne!(both[0].lora.id, both[1].lora.id);
        let alone = from(&["--lora-modules", &unknown, "--enable-lora"]).unwrap();
        assert_eq!(
            (alone[0].lora.id, &alone[0].parent[..]),
            (both[1].lora.id, "m")
        );
        assert!(from(&["--enable-lora"]).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_flag_that_helps() {
        let (small, large) = (adapter(8), adapter(24));
        let small = format!("x={}", small.path().display());
        let large = format!("y={}", large.path().display());
        let as_model = small.replace("x=", "alias=");
        for (args, remedy) in [
            (vec![&small[..]], "--enable-lora"),
            (vec!["--no-enable-lora", &small], "--enable-lora"),
            (vec!["--enable-lora", "x=/nowhere"], "hf download /nowhere"),
            (vec!["--enable-lora", &as_model], "--served-model-name"),
            (vec!["--enable-lora", &large], "--max-lora-rank 32"),
            (vec!["--enable-lora", "=/a"], "NAME=PATH"),
            (vec!["--enable-lora", "{\"name\":\"x\"}"], "`path`"),
        ] {
            let last = args.len() - 1;
            let mut line = args[..last].to_vec();
            line.extend(["--lora-modules", args[last]]);
            let error = from(&line).unwrap_err().to_string();
            assert!(
                error.contains(remedy) && error.contains("--lora-modules"),
                "{error}"
            );
        }
        let twice = from(&["--enable-lora", "--lora-modules", &small, &small]);
        assert!(matches!(twice, Err(AdapterError::Twice(name)) if name == "x"));
        let taken = [
            "--enable-lora",
            "--max-lora-rank=64",
            "--lora-modules",
            &large,
        ];
        assert_eq!(from(&taken).unwrap().len(), 1);
    }

    #[test]
    fn a_largest_rank_that_is_no_number_is_refused() {
        for flag in ["--max-lora-rank=many", "--max-lora-rank="] {
            let error = from(&["--enable-lora", flag]).unwrap_err().to_string();
            assert!(error.contains("--max-lora-rank"), "{error}");
        }
    }

    #[test]
    fn processors_are_told_of_the_files_that_engines_are_to_load() {
        let folder = adapter(8);
        let module = format!("x={}", folder.path().display());
        let hashed = || {
            let found = from(&["--enable-lora", "--lora-modules", &module]).unwrap();
            found[0].clone().hash().unwrap()
        };
        let first = hashed();
        fs::write(folder.path().join(WEIGHTS[0]), "others").unwrap();
        let second = hashed();
        // To an engine they are the same, so it must not be the same engine.
        assert_eq!(first.loaded.lora, second.loaded.lora);
        assert_ne!(first.card().hash, second.card().hash);
        assert_eq!(first.card().hash, first.loaded.hash);
    }
}
