//! Fetches a model's files from a worker and builds what requests need of them.
//!
//! Files are asked for by content hash, which the client checks; no folder need be shared with the
//! worker. They are kept only as what is built of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use stator_common::card;
use stator_common::plane::PlaneError;
use stator_text::template::ChatTemplates;
use stator_text::{ModelFiles, SegmentCache, Tokenizer};
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::GenerationConfig;
use crate::pool::Worker;

/// The largest file that is fetched. The largest tokenizers of 2026 have about 40 MB.
const MAX_FILE: u64 = 256 << 20;

/// Memory for remembered pieces of prompts, per model: about four million tokens of conversations.
const SEGMENT_BYTES: usize = 64 << 20;

/// How long workers are waited for before others, which may have come by then, are waited for as well.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

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
    /// No worker could be connected to.
    #[error("none of {workers} workers could be connected to")]
    Unreachable {
        /// How many were tried.
        workers: usize,
    },
    /// The worker could not deliver a file.
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
            Self::Unreachable { .. } | Self::Fetch { .. } => true,
            Self::TooLarge { .. }
            | Self::NoTokenizer
            | Self::Tokenizer(_)
            | Self::GenerationConfig(_)
            | Self::Defect(_) => false,
        }
    }
}

/// Loads a model from one of `workers`, whichever is connected first.
///
/// - `workers`: not empty; they agree about the files.
///
/// # Errors
/// [`LoadError`]. One that may pass is worth another try, with the workers that are there by then.
pub(super) async fn any(workers: &[Arc<Worker>]) -> Result<Assets, LoadError> {
    let files = fetch(first_connected(workers).await?).await?;
    let built = tokio::task::spawn_blocking(move || build(&files)).await;
    let assets = built.map_err(LoadError::Defect)??;
    speed_up(assets.tokenizer.clone());
    Ok(assets)
}

/// Has the tokenizer made faster, while it is in use already.
///
/// On a thread that nobody waits for: it computes for seconds, and a process that ends need not see it done.
fn speed_up(tokenizer: Tokenizer) {
    let work = move || match tokenizer.speed_up() {
        Ok(()) => debug!("the faster tokenizer is in use"),
        Err(reason) => info!(%reason, "the faster tokenizer cannot be used for this model"),
    };
    if let Err(error) = std::thread::Builder::new()
        .name("speed-up".to_owned())
        .spawn(work)
    {
        warn!(%error, "no thread to load the faster tokenizer on");
    }
}

async fn first_connected(workers: &[Arc<Worker>]) -> Result<&Worker, LoadError> {
    // Started at random: if the first one delivers nothing, the next try meets another.
    let start = rand::random_range(0..workers.len());
    let mut waiting: FuturesUnordered<_> = (start..start + workers.len())
        .map(|index| &workers[index % workers.len()])
        .map(|worker| async move { worker.client().ready().await.map(|()| worker) })
        .collect();
    let first = async {
        while let Some(ready) = waiting.next().await {
            match ready {
                Ok(worker) => return Some(worker),
                Err(error) => debug!(%error, "worker not usable"),
            }
        }
        None
    };
    let first = timeout(CONNECT_WITHIN, first).await.ok().flatten();
    first.map(|worker| &**worker).ok_or(LoadError::Unreachable {
        workers: workers.len(),
    })
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
