//! From a chat request to its choices.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::reader::{Reader, Thinking};
use super::render::{Rendering, render};
use super::tools::{self, Asked, Calls, Hold, Plan, Wish};
use super::types::{ChatFields, ChatRequest, Tool};
use crate::App;
use crate::generate::Choice;
use crate::models::Model;
use crate::openai::common::{self, Arrival, Common, Head, StreamUsage};
use crate::openai::error::ApiError;
use crate::openai::prompt::{Prompt, Rules};
use crate::openai::request::{Int, Shared};
use crate::openai::sampling::{self, Wanted};
use crate::openai::structured;

/// How hard a model may be asked to think (vLLM's list).
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// A request ready to be sent.
pub(super) struct Prepared {
    pub(super) choices: Vec<Choice>,
    /// One per choice.
    pub(super) readers: Vec<Reader>,
    /// One more per choice, to count thoughts; none where none are looked for.
    pub(super) counters: Vec<Reader>,
    pub(super) answer: Answer,
    /// Present if the answer is a stream.
    pub(super) stream: Option<StreamUsage>,
}

/// What the answer repeats of the request.
pub(super) struct Answer {
    pub(super) head: Head,
    pub(super) prompt: Prompt,
    /// Who speaks.
    pub(super) role: String,
    /// What the message begins with, where the request asked to see its last message again.
    pub(super) echo: String,
    pub(super) wish: Wish,
    /// Candidates shown per token; -1: all.
    pub(super) logprobs: Option<i64>,
    pub(super) prompt_logprobs: bool,
    pub(super) return_token_ids: bool,
    pub(super) return_prompt_text: bool,
    pub(super) tokens_as_ids: bool,
    /// Whether thoughts are shown. If not, neither are tokens and log-probabilities, which would tell.
    pub(super) include_reasoning: bool,
    pub(super) parallel_tool_calls: bool,
}

/// Validates a request, renders and tokenizes its conversation.
///
/// # Errors
/// A field is missing, malformed or out of range.
pub(super) async fn prepare(
    request: ChatRequest,
    bytes: usize,
    model: &Arc<Model>,
    arrival: &Arrival,
    app: &App,
) -> Result<Prepared, ApiError> {
    let ChatRequest { mut own, shared } = request;
    let head = Head::new("chatcmpl", &shared, arrival, model);
    let mut common = Common::new(&shared, &head, arrival, model)?;
    let stream_usage = StreamUsage::new(&shared)?;
    let stream = (shared.stream == Some(true)).then_some(stream_usage);
    let logprobs = logprobs(&own)?;
    let prompt_logprobs = prompt_logprobs(&own, &shared)?;
    let parallel = own.parallel_tool_calls != Some(false);
    let parser = model.card.tool_call_parser.as_deref();
    let plan = tools::plan(
        own.tools.as_deref(),
        own.tool_choice.as_ref(),
        parallel,
        parser,
        Asked::of(&shared),
    )?;

    let limits = common::limits(model);
    let rules = Rules::new(&shared, "messages", false, &limits)?;
    let messages = own.messages.take().unwrap_or_default();
    let (role, echo) = opening(&messages, &own, &shared);
    let rendering = rendering(messages, &mut own)?;
    let thinking = wanted_thinking(rendering.kwargs.as_ref());
    let tools = rendering.tools.clone().unwrap_or_default();
    let prompt = render(model, rendering, rules, bytes, app).await?;

    let (max_tokens, max_tokens_field) = match own.max_completion_tokens {
        Some(Int(max)) => (Some(max), "max_completion_tokens"),
        None => (shared.max_tokens.map(|Int(max)| max), "max_tokens"),
    };
    let wanted = Wanted {
        max_tokens,
        max_tokens_field,
        logprobs,
        logprobs_field: "top_logprobs",
        prompt_logprobs,
        prompt_len: prompt.tokens.len(),
    };
    let Plan { calls, wish, hold } = plan;
    let mut sampling = sampling::sampling(&shared, &wanted, &limits, &model.assets.tokenizer)?;
    if matches!(hold, Hold::To(_)) {
        common.constrain_by_tools();
    }
    sampling.structured_outputs = hold.apply(sampling.structured_outputs.take());
    if let Some(constraint) = sampling
        .structured_outputs
        .as_ref()
        .and_then(|outputs| outputs.constraint.as_ref())
    {
        structured::check_size("tools", constraint, 0)?;
    }
    let thinking = Thinking {
        prompt: prompt.text.as_deref().unwrap_or_default(),
        wanted: thinking,
    };
    let reader = || Reader::new(model, &calls, &tools, thinking);
    let readers = (0..common.n())
        .map(|_| reader())
        .collect::<Result<Vec<_>, _>>()?;
    let counts = stream.is_none() && model.card.reasoning_parser.is_some();
    let counter = || Reader::new(model, &Calls::None, &[], thinking);
    let counters = (0..common.n())
        .filter(|_| counts)
        .map(|_| counter())
        .collect::<Result<_, _>>()?;
    if own.include_reasoning == Some(false) {
        // Nobody would see thoughts; as in vLLM, the constraint then leaves no room for them.
        common.constrain_thoughts();
    }
    if readers.iter().any(Reader::needs_special_tokens) {
        common.keep_special_tokens();
    }
    let choices = common.choices(model, &prompt, &sampling)?;
    let answer = Answer {
        head,
        prompt,
        role,
        echo,
        wish,
        logprobs,
        prompt_logprobs: prompt_logprobs.is_some(),
        return_token_ids: shared.return_token_ids == Some(true),
        return_prompt_text: own.return_prompt_text == Some(true),
        tokens_as_ids: shared.return_tokens_as_token_ids == Some(true),
        include_reasoning: own.include_reasoning != Some(false),
        parallel_tool_calls: parallel,
    };
    Ok(Prepared {
        choices,
        readers,
        counters,
        answer,
        stream,
    })
}

/// Returns the candidates to be shown per token.
fn logprobs(own: &ChatFields) -> Result<Option<i64>, ApiError> {
    let top = own.top_logprobs.map_or(0, |Int(top)| top);
    if own.logprobs == Some(true) {
        return Ok(Some(top));
    }
    if top == 0 {
        return Ok(None);
    }
    Err(ApiError::invalid(
        "top_logprobs",
        "top_logprobs needs logprobs to be true",
    ))
}

fn prompt_logprobs(own: &ChatFields, shared: &Shared) -> Result<Option<i64>, ApiError> {
    let asked = shared.prompt_logprobs.map(|Int(count)| count);
    if shared.stream == Some(true) && asked.is_some_and(|count| count != 0) {
        let message = "prompt_logprobs are not available in a stream";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }
    let echoed = own.top_logprobs.map_or(0, |Int(top)| top);
    Ok(asked.or((shared.echo == Some(true)).then_some(echoed)))
}

/// Returns who speaks, and with what the message begins.
fn opening(messages: &[Value], own: &ChatFields, shared: &Shared) -> (String, String) {
    let continues = own.continue_final_message == Some(true);
    let last = messages.last();
    let last_role = last
        .and_then(|last| last["role"].as_str())
        .unwrap_or_default();
    let role = if own.add_generation_prompt.unwrap_or(!continues) {
        "assistant"
    } else {
        last_role
    };
    let echo = match last {
        Some(last) if shared.echo == Some(true) && role == last_role => text_of(&last["content"]),
        _ => String::new(),
    };
    (role.to_owned(), echo)
}

fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<_> = parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

/// Returns whether the request asks the model to think.
fn wanted_thinking(kwargs: Option<&Map<String, Value>>) -> Option<bool> {
    ["enable_thinking", "thinking"]
        .iter()
        .find_map(|name| kwargs?.get(*name)?.as_bool())
}

fn rendering(messages: Vec<Value>, own: &mut ChatFields) -> Result<Rendering, ApiError> {
    let mut kwargs = own.chat_template_kwargs.take();
    if let Some(effort) = own.reasoning_effort.take() {
        if !EFFORTS.contains(&effort.as_str()) {
            let message = format!("reasoning_effort must be one of {}", EFFORTS.join(", "));
            return Err(ApiError::invalid("reasoning_effort", message));
        }
        let kwargs = kwargs.get_or_insert_default();
        kwargs
            .entry("enable_thinking")
            .or_insert((effort != "none").into());
        kwargs.insert("reasoning_effort".to_owned(), effort.into());
    }
    let tools = own.tools.as_ref();
    Ok(Rendering {
        messages,
        tools: tools.map(|tools| tools.iter().map(Tool::for_template).collect()),
        documents: own.documents.take(),
        add_generation_prompt: own.add_generation_prompt,
        continue_final_message: own.continue_final_message == Some(true),
        kwargs,
        chat_template: own.chat_template.take(),
    })
}
