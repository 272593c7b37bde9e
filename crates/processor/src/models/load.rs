//! Fetches a model's files from a worker and builds what requests need of them.
//!
//! Files are asked for by content hash, which the client checks; no folder need be shared with the
//! worker. They are kept only as what is built of them.

use std::sync::Arc;

use bytes::Bytes;
use stator_common::card;
use stator_common::plane::tcp::PlaneError;
use stator_text::template::ChatTemplates;
use stator_text::{ModelFiles, SegmentCache, Tokenizer};
use tracing::{debug, error};

use super::GenerationConfig;
use crate::pool::Worker;

/// The largest file that is fetched. The largest tokenizers of 2026 have about 40 MB.
const MAX_FILE: u64 = 256 << 20;

/// Memory for remembered pieces of prompts, per model: about four million tokens of conversations.
const SEGMENT_BYTES: usize = 64 << 20;

/// What a model's files say.
#[derive(Clone)]
pub struct Assets {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text. Empty where the model has no template, or none that compiles.
    pub chat_templates: Arc<ChatTemplates>,
    /// Defaults of sampling.
    pub generation_config: Arc<GenerationConfig>,
}

/// Why a model's files could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No worker could deliver a file.
    #[error("fetch {file}: {source}")]
    Fetch {
        /// The file.
        file: String,
        /// Why.
        source: PlaneError,
    },
    /// The file is not plausible.
    #[error("{file} has {size} bytes, the limit is {MAX_FILE}")]
    TooLarge {
        /// The file.
        file: String,
        /// Its announced size.
        size: u64,
    },
    /// A file without which nothing can be tokenized.
    #[error("the worker has no tokenizer.json")]
    NoTokenizer,
    /// The tokenizer cannot be built.
    #[error("tokenizer: {0}")]
    Tokenizer(#[from] stator_text::LoadError),
    /// The sampling defaults cannot be read.
    #[error("generation_config.json: {0}")]
    GenerationConfig(#[from] serde_json::Error),
    /// Building panicked: a defect of a parser.
    #[error("building the model's tokenizer failed: {0}")]
    Defect(tokio::task::JoinError),
}

impl LoadError {
    /// Says whether the same files may load later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Fetch { .. } => true,
            Self::TooLarge { .. }
            | Self::NoTokenizer
            | Self::Tokenizer(_)
            | Self::GenerationConfig(_)
            | Self::Defect(_) => false,
        }
    }
}

/// Loads a model from the first of `workers` that can deliver its files.
///
/// - `workers`: not empty; they agree about the files.
///
/// # Errors
/// [`LoadError`], of the last worker if the files could not be fetched.
pub(super) async fn any(workers: &[Arc<Worker>]) -> Result<Assets, LoadError> {
    let mut failure = None;
    // The workers that are connected already come first.
    let (ready, others): (Vec<_>, Vec<_>) = workers.iter().partition(|worker| worker.is_ready());
    for worker in ready.into_iter().chain(others) {
        match fetch(worker).await {
            Ok(files) => {
                let built = tokio::task::spawn_blocking(move || build(&files)).await;
                return built.map_err(LoadError::Defect)?;
            }
            Err(error) if error.may_pass() => {
                debug!(worker = %worker.id(), %error, "model files not fetched");
                failure = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(failure.expect("a group that loads has a worker"))
}

/// The files of a model, each absent where the worker has none.
#[derive(Default)]
struct Files {
    tokenizer: Option<Bytes>,
    tokenizer_config: Option<Bytes>,
    special_tokens_map: Option<Bytes>,
    chat_template: Option<Bytes>,
    config: Option<Bytes>,
    generation_config: Option<Bytes>,
}

async fn fetch(worker: &Worker) -> Result<Files, LoadError> {
    let card = worker.card();
    let client = worker.client();
    let lost = |source| LoadError::Fetch {
        file: "tokenizer.json".to_owned(),
        source,
    };
    client.ready().await.map_err(lost)?;
    let mut files = Files::default();
    for (name, file) in &card.model.files {
        let slot = match name.as_str() {
            "tokenizer.json" => &mut files.tokenizer,
            "tokenizer_config.json" => &mut files.tokenizer_config,
            "special_tokens_map.json" => &mut files.special_tokens_map,
            "chat_template.jinja" => &mut files.chat_template,
            "config.json" => &mut files.config,
            "generation_config.json" => &mut files.generation_config,
            _ => continue,
        };
        *slot = Some(fetch_one(worker, name, file).await?);
    }
    Ok(files)
}

async fn fetch_one(worker: &Worker, name: &str, file: &card::File) -> Result<Bytes, LoadError> {
    if file.size > MAX_FILE {
        return Err(LoadError::TooLarge {
            file: name.to_owned(),
            size: file.size,
        });
    }
    let fetched = worker.client().blob(&file.hash).await;
    fetched.map_err(|source| LoadError::Fetch {
        file: name.to_owned(),
        source,
    })
}

/// Takes up to seconds for a large vocabulary: not for an async thread.
fn build(files: &Files) -> Result<Assets, LoadError> {
    let sources = ModelFiles {
        tokenizer_json: files.tokenizer.as_deref().ok_or(LoadError::NoTokenizer)?,
        tokenizer_config: files.tokenizer_config.as_deref(),
        special_tokens_map: files.special_tokens_map.as_deref(),
        config: files.config.as_deref(),
        generation_config: files.generation_config.as_deref(),
        chat_template: files.chat_template.as_deref(),
    };
    // The seed names segments in a cache that clients fill: they must not be able to guess it.
    let segments = SegmentCache {
        bytes: SEGMENT_BYTES,
        seed: rand::random(),
    };
    let generation_config =
        GenerationConfig::read(files.generation_config.as_deref(), files.config.as_deref())?;
    let tokenizer = Tokenizer::from_files(&sources, segments)?;
    // Without a template the model still completes texts.
    let chat_templates = ChatTemplates::from_files(&sources, tokenizer.special())
        .inspect_err(
            |error| error!(%error, "chat template unusable: chat requests will be refused"),
        )
        .unwrap_or_default();
    Ok(Assets {
        tokenizer,
        chat_templates: Arc::new(chat_templates),
        generation_config: Arc::new(generation_config),
    })
}
