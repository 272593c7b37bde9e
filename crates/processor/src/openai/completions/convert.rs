//! From a completion request to its choices.

use std::sync::Arc;

use super::types::{CompletionRequest, Prompts};
use crate::generate::Choice;
use crate::models::Model;
use crate::openai::common::{self, Arrival, Common, Head, StreamUsage};
use crate::openai::error::ApiError;
use crate::openai::prompt::{LongWork, Prompt, Rules};
use crate::openai::request::Int;
use crate::openai::sampling::{self, MAX_CHOICES, Wanted};

/// Tokens to generate where the request does not say (OpenAI's and vLLM's default).
const DEFAULT_MAX_TOKENS: i64 = 16;
/// Prompts per request (vLLM's `VLLM_MAX_COMPLETION_PROMPTS`).
const MAX_PROMPTS: usize = 1024;

/// A request ready to be sent.
pub(super) struct Prepared {
    /// `n` per prompt, prompt by prompt.
    pub(super) choices: Vec<Choice>,
    pub(super) answer: Answer,
    /// Present if the answer is a stream.
    pub(super) stream: Option<StreamUsage>,
}

/// What the answer repeats of the request.
pub(super) struct Answer {
    pub(super) head: Head,
    pub(super) prompts: Vec<Prompt>,
    /// Choices per prompt.
    pub(super) n: usize,
    pub(super) echo: Echo,
    /// Candidates shown per token; -1: all.
    pub(super) logprobs: Option<i64>,
    pub(super) prompt_logprobs: bool,
    pub(super) return_token_ids: bool,
    pub(super) tokens_as_ids: bool,
}

/// Whether the prompt is part of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    No,
    /// Before the answer.
    Before,
    /// And nothing is generated (`max_tokens` 0; the engine cannot do less than one token).
    Only,
}

/// Validates a request and tokenizes its prompts.
///
/// # Errors
/// A field is missing, malformed or out of range.
pub(super) async fn prepare(
    request: CompletionRequest,
    model: &Arc<Model>,
    arrival: &Arrival,
    work: &LongWork,
) -> Result<Prepared, ApiError> {
    let CompletionRequest { own, shared } = request;
    let head = Head::new("cmpl", &shared, arrival, model);
    let mut common = Common::new(&shared, &head, arrival, model)?;
    let stream_usage = StreamUsage::new(&shared)?;
    let stream = (shared.stream == Some(true)).then_some(stream_usage);
    if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix is not supported"));
    }
    let prompt_logprobs = shared.prompt_logprobs.map(|Int(count)| count);
    if stream.is_some() && prompt_logprobs.is_some_and(|count| count != 0) {
        let message = "prompt_logprobs are not available in a stream";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }
    let max_tokens = shared.max_tokens.map_or(DEFAULT_MAX_TOKENS, |Int(max)| max);
    let echo = match (shared.echo, max_tokens) {
        (Some(true), 0) => Echo::Only,
        (Some(true), _) => Echo::Before,
        _ => Echo::No,
    };
    let logprobs = own.logprobs.map(|Int(count)| count);
    let asked = prompt_logprobs.or(logprobs.filter(|_| echo != Echo::No));

    let limits = common::limits(model);
    let rules = Rules::new(&shared, "prompt", true, &limits)?;
    let prompts = own
        .prompt
        .ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    let count = prompts.count()?;
    if count * common.n() > MAX_CHOICES {
        let message = format!(
            "n={} for each of {count} prompts: a request can have {MAX_CHOICES} choices at most",
            common.n()
        );
        return Err(ApiError::invalid("n", message));
    }
    let prompts = tokenize(prompts, rules, model, work).await?;
    let mut wanted = Wanted {
        max_tokens: Some(if echo == Echo::Only { 1 } else { max_tokens }),
        max_tokens_field: "max_tokens",
        logprobs,
        logprobs_field: "logprobs",
        prompt_logprobs: asked,
        prompt_len: prompts.first().map_or(0, |prompt| prompt.tokens.len()),
    };
    let mut sampling = sampling::sampling(&shared, &wanted, &limits, &model.assets.tokenizer)?;
    let mut choices = Vec::with_capacity(count * common.n());
    for prompt in &prompts {
        wanted.prompt_len = prompt.tokens.len();
        (sampling.max_tokens, sampling.min_tokens) = sampling::lengths(&shared, &wanted, &limits)?;
        choices.extend(common.choices(model, prompt, &sampling)?);
    }
    let answer = Answer {
        head,
        prompts,
        n: common.n(),
        echo,
        logprobs,
        prompt_logprobs: asked.is_some(),
        return_token_ids: shared.return_token_ids == Some(true),
        tokens_as_ids: shared.return_tokens_as_token_ids == Some(true),
    };
    Ok(Prepared {
        choices,
        answer,
        stream,
    })
}

async fn tokenize(
    prompts: Prompts,
    rules: Rules,
    model: &Arc<Model>,
    work: &LongWork,
) -> Result<Vec<Prompt>, ApiError> {
    let bytes = match &prompts {
        Prompts::Text(text) => text.len(),
        Prompts::Texts(texts) => texts.iter().map(String::len).sum(),
        Prompts::Tokens(_) | Prompts::TokenLists(_) => 0,
    };
    let model = Arc::clone(model);
    work.run(bytes, move || {
        let tokenizer = &model.assets.tokenizer;
        match prompts {
            Prompts::Text(text) => Ok(vec![rules.tokenize(tokenizer, text)?]),
            Prompts::Texts(texts) => texts
                .into_iter()
                .map(|text| rules.tokenize(tokenizer, text))
                .collect(),
            Prompts::Tokens(tokens) => Ok(vec![rules.tokens(&tokens)?]),
            Prompts::TokenLists(lists) => lists.iter().map(|tokens| rules.tokens(tokens)).collect(),
        }
    })
    .await
}

impl Prompts {
    /// Returns how many there are.
    fn count(&self) -> Result<usize, ApiError> {
        let count = match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        };
        if (1..=MAX_PROMPTS).contains(&count) {
            return Ok(count);
        }
        let message = format!("prompt: 1 to {MAX_PROMPTS} prompts are accepted, got {count}");
        Err(ApiError::invalid("prompt", message))
    }
}

impl Answer {
    /// Returns the prompt of a choice, and its index.
    pub(super) fn prompt(&self, choice: usize) -> (usize, &Prompt) {
        let index = choice / self.n;
        (index, &self.prompts[index])
    }

    /// Returns the text of a prompt as the answer shows it, or nothing where its tokens are shown.
    pub(super) fn echoed(&self, prompt: &Prompt, model: &Model) -> Result<String, ApiError> {
        match (&prompt.text, self.return_token_ids) {
            (_, true) => Ok(String::new()),
            (Some(text), false) => Ok(text.clone()),
            (None, false) => Ok(model.assets.tokenizer.decode(&prompt.tokens, false)?),
        }
    }
}
