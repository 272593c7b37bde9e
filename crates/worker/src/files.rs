//! The files of a model that processors need, served by their content.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use ahash::AHashMap;
use bytes::Bytes;
use serde_json::{Map, Value};
use stator_common::{BlobHash, card};
use stator_engine::{flags::Given, model};

/// What of a model's folder is served, if it exists. Everything else there is the engine's.
const NAMES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
];

const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The files of one model, in memory.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// As the card names them.
    pub(crate) named: BTreeMap<String, card::File>,
    by_hash: AHashMap<BlobHash, Bytes>,
}

/// Why a model's files cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error(
        "the files of model '{0}' are not on this machine: name its folder, or fetch it into the Hugging Face cache"
    )]
    NoFolder(String),
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a JSON object: {reason}")]
    Json { path: PathBuf, reason: String },
    #[error("--override-generation-config is not a JSON object: {0}")]
    Override(String),
}

impl Files {
    /// Reads the files as the engine's flags name them: `--tokenizer` may be another folder,
    /// `--generation-config` and `--override-generation-config` change the defaults of sampling.
    ///
    /// - `folder`: the model's, as far as the engine knows it.
    /// - `chat_template`: a file, or a template (which has a `{`).
    ///
    /// # Errors
    /// [`FilesError`].
    pub(crate) fn read(
        model_name: &str,
        folder: Option<&Path>,
        chat_template: Option<&str>,
        engine_args: &[String],
    ) -> Result<Self, FilesError> {
        let no_folder = |name: &str| FilesError::NoFolder(name.to_owned());
        let folder = match folder {
            Some(folder) => folder.to_owned(),
            None => model::folder(model_name).ok_or_else(|| no_folder(model_name))?,
        };
        let given = Given::read(engine_args);
        let tokenizer = match given.value("tokenizer") {
            Some(name) => tokenizer_folder(name).ok_or_else(|| no_folder(name))?,
            None => folder.clone(),
        };
        let mut files = Self::default();
        for name in NAMES {
            let of_tokenizer = name.contains("token") || name.contains("template");
            let path = if of_tokenizer { &tokenizer } else { &folder }.join(name);
            if let Some(bytes) = read_if_there(&path)? {
                files.add(name, bytes);
            }
        }
        files.set_generation_config(&given)?;
        match chat_template {
            Some(template) if template.contains('{') => {
                files.add(CHAT_TEMPLATE, template.to_owned().into_bytes());
            }
            Some(path) => {
                let path = Path::new(path);
                let bytes = fs::read(path).map_err(|source| FilesError::Read {
                    path: path.to_owned(),
                    source,
                })?;
                files.add(CHAT_TEMPLATE, bytes);
            }
            None => {}
        }
        Ok(files)
    }

    /// Returns a file by its content.
    pub(crate) fn get(&self, hash: &BlobHash) -> Option<Bytes> {
        self.by_hash.get(hash).cloned()
    }

    fn add(&mut self, name: &str, bytes: Vec<u8>) {
        let file = card::File::of(&bytes);
        if let Some(old) = self.named.insert(name.to_owned(), file.clone()) {
            self.by_hash.remove(&old.hash);
        }
        self.by_hash.insert(file.hash, bytes.into());
    }

    fn remove(&mut self, name: &str) -> Option<Bytes> {
        let file = self.named.remove(name)?;
        self.by_hash.remove(&file.hash)
    }

    /// As vLLM's `ModelConfig.try_get_generation_config` and `get_diff_sampling_param` (0.32,
    /// config/model.py): `auto` is the model's, `vllm` is none, else a folder; then the overrides.
    fn set_generation_config(&mut self, given: &Given<'_>) -> Result<(), FilesError> {
        match given.value("generation-config") {
            None | Some("auto") => {}
            Some("vllm") => drop(self.remove(GENERATION_CONFIG)),
            Some(folder) => {
                self.remove(GENERATION_CONFIG);
                let path = Path::new(folder).join(GENERATION_CONFIG);
                if let Some(bytes) = read_if_there(&path)? {
                    self.add(GENERATION_CONFIG, bytes);
                }
            }
        }
        let Some(text) = given.value("override-generation-config") else {
            return Ok(());
        };
        let overrides: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| FilesError::Override(error.to_string()))?;
        let mut config: Map<String, Value> = match self.remove(GENERATION_CONFIG) {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| FilesError::Json {
                path: GENERATION_CONFIG.into(),
                reason: error.to_string(),
            })?,
            None => Map::new(),
        };
        config.extend(overrides);
        let bytes = serde_json::to_vec(&config).expect("a JSON object can be written as JSON");
        self.add(GENERATION_CONFIG, bytes);
        Ok(())
    }
}

/// A tokenizer's folder need not hold a model.
fn tokenizer_folder(name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.is_dir() {
        Some(path.to_owned())
    } else {
        model::folder(name)
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, FilesError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FilesError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("config.json", "{}"),
            ("tokenizer.json", "{\"a\": 1}"),
            (
                "generation_config.json",
                "{\"temperature\": 0.5, \"top_k\": 3}",
            ),
            ("model.safetensors", "weights"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn read(folder: &Path, template: Option<&str>, args: &[&str]) -> Files {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        Files::read("m", Some(folder), template, &args).unwrap()
    }

    fn text(files: &Files, name: &str) -> Option<String> {
        let file = files.named.get(name)?;
        let bytes = files.get(&file.hash).unwrap();
        assert_eq!(bytes.len() as u64, file.size);
        Some(String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn files_are_found_by_content_and_weights_are_not_served() {
        let folder = folder();
        let files = read(folder.path(), None, &[]);
        assert_eq!(text(&files, "tokenizer.json").unwrap(), "{\"a\": 1}");
        assert!(!files.named.contains_key("model.safetensors"));
        assert_eq!(files.get(&BlobHash::of(b"weights")), None);
    }

    #[test]
    fn the_engines_flags_decide_upon_sampling_defaults() {
        let folder = folder();
        let none = read(folder.path(), None, &["--generation-conf", "vllm"]);
        assert_eq!(text(&none, GENERATION_CONFIG), None);
        let overridden = read(
            folder.path(),
            None,
            &["--override_generation_config={\"top_k\": 9}"],
        );
        let config: Value =
            serde_json::from_str(&text(&overridden, GENERATION_CONFIG).unwrap()).unwrap();
        assert_eq!(config, serde_json::json!({"temperature": 0.5, "top_k": 9}));
    }

    #[test]
    fn a_tokenizer_of_its_own_and_a_given_template_win() {
        let folder = folder();
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("tokenizer.json"), "other").unwrap();
        fs::write(other.path().join("chat_template.jinja"), "theirs").unwrap();
        let tokenizer = other.path().to_str().unwrap();
        let files = read(folder.path(), None, &["--tokenizer", tokenizer]);
        assert_eq!(text(&files, "tokenizer.json").unwrap(), "other");
        assert_eq!(text(&files, CHAT_TEMPLATE).unwrap(), "theirs");
        let files = read(
            folder.path(),
            Some("{{ messages }}"),
            &["--tokenizer", tokenizer],
        );
        assert_eq!(text(&files, CHAT_TEMPLATE).unwrap(), "{{ messages }}");
    }

    #[test]
    fn a_model_that_is_nowhere_is_named() {
        let error = Files::read("nobody/nothing", None, None, &[]).unwrap_err();
        assert!(error.to_string().contains("nobody/nothing"));
    }
}
