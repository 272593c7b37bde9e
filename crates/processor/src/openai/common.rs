//! What the generating endpoints do alike: find the model, name the request, begin its choices.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use axum::response::Response;
use bytes::BytesMut;
use stator_common::Code;
use stator_common::proto::worker::{GenerateRequest, Sampling};
use stator_text::{DetokenizeOptions, OutputText, StopStrings};
use tokio::time::Instant;

use super::error::ApiError;
use super::json;
use super::prompt::Prompt;
use super::request::{Int, Shared};
use super::route;
use super::sampling::{self, Limits};
use super::structured;
use crate::App;
use crate::config::Config;
use crate::fleet::{Order, Siblings};
use crate::generate::Choice;
use crate::models::Model;
use crate::pool::Route;
use crate::server::RequestId;

/// Characters of a cache salt (vLLM's `_MAX_CACHE_SALT_LENGTH`; longer ones do not fit downstream caches).
const MAX_SALT: usize = 128;

/// Characters of a request's id, its prefix included (`stator-engine`'s limit).
const MAX_ID: usize = 512;
/// Bytes that all choices of a request may take together on their way to the workers: as much as 32 prompts of
/// two million tokens.
const MAX_CHOICE_BYTES: usize = 256 << 20;

/// Returns the model that a request names; without a name, the only one there is.
///
/// # Errors
/// It does not exist, or several do and none was named.
pub(crate) fn model(app: &App, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
    if let Some(name) = name.filter(|name| !name.is_empty()) {
        return app
            .models
            .find(name)
            .map_err(|error| ApiError::new(error.code(), error.to_string()).with_param("model"));
    }
    match &app.models.list()[..] {
        [model] => Ok(Arc::clone(model)),
        [] => Err(ApiError::new(
            Code::Unavailable,
            "no model is being served yet",
        )),
        _ => Err(ApiError::invalid(
            "model",
            "model: several models are served, name one",
        )),
    }
}

/// Returns what a model allows.
pub(crate) fn limits(model: &Model) -> Limits<'_> {
    Limits {
        max_model_len: model.card.max_model_len,
        vocab_size: model.card.vocab_size,
        max_logprobs: model.card.max_logprobs,
        eos_token_id: model.assets.tokenizer.special().eos_id,
        generation: &model.assets.generation_config,
    }
}

/// What came with a request besides its body.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) id: RequestId,
    pub(crate) headers: HeaderMap,
    /// When the client's patience ends.
    deadline: Option<Instant>,
    rules: route::Rules,
    /// Collects why workers were chosen, where the client wants to know.
    told: Option<route::Told>,
}

impl Arrival {
    /// Notes a request that has come now.
    ///
    /// # Errors
    /// The header that bounds its time is not a number of milliseconds.
    pub(crate) fn new(
        id: RequestId,
        headers: HeaderMap,
        config: &Config,
    ) -> Result<Self, ApiError> {
        let timeout = own_timeout(&headers)?.or(config.request_timeout);
        Ok(Self {
            id,
            deadline: timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            rules: route::Rules::new(config),
            told: route::told(&headers),
            headers,
        })
    }

    /// Adds to the answer what the client wants to know of its way.
    pub(crate) fn tell(&self, mut response: Response) -> Response {
        if let Some(told) = &self.told {
            route::tell(told, &mut response);
        }
        response
    }
}

/// Reads the header by which a client bounds its request's time.
fn own_timeout(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let name = "x-request-timeout-ms";
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let milliseconds = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    match milliseconds.filter(|&milliseconds| milliseconds > 0) {
        Some(milliseconds) => Ok(Some(Duration::from_millis(milliseconds))),
        None => {
            let message =
                format!("{name} must be a positive number of milliseconds, got {value:?}");
            Err(ApiError::invalid(name, message))
        }
    }
}

/// What every event and answer of a request repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
}

impl Head {
    /// Names a request: by the client's `x-request-id`, its `request_id`, or at random.
    pub(crate) fn new(prefix: &str, shared: &Shared, arrival: &Arrival, model: &Model) -> Self {
        let own = shared
            .request_id
            .as_deref()
            .filter(|_| !arrival.headers.contains_key("x-request-id"));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{}", own.unwrap_or(arrival.id.as_str())),
            created: now.map_or(0, |now| now.as_secs()),
            model: model.id.clone(),
        }
    }

    /// Writes the beginning of an answer, up to and without `"choices"`.
    pub(crate) fn write(&self, object: &str, out: &mut BytesMut) {
        json::raw(out, "{\"id\":");
        json::string(out, &self.id);
        json::raw(out, ",\"object\":\"");
        json::raw(out, object);
        json::raw(out, "\",\"created\":");
        json::number(out, self.created);
        json::raw(out, ",\"model\":");
        json::string(out, &self.model);
        json::raw(out, ",");
    }

    /// Returns the beginning of every event of a stream, up to and with `"choices":[`.
    pub(crate) fn event(&self, object: &str) -> BytesMut {
        let mut out = BytesMut::from("data: ");
        self.write(object, &mut out);
        json::raw(&mut out, "\"choices\":[");
        out
    }
}

/// Whether a stream carries its usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    /// Not at all.
    #[default]
    Never,
    /// In one more event at its end.
    AtEnd,
    /// In every event.
    Continuous,
}

impl StreamUsage {
    /// Reads `stream_options`.
    ///
    /// # Errors
    /// They are there and the answer is not a stream.
    pub(crate) fn new(shared: &Shared) -> Result<Self, ApiError> {
        let Some(options) = shared.stream_options else {
            return Ok(Self::Never);
        };
        let name = "stream_options";
        if shared.stream != Some(true) {
            return Err(ApiError::invalid(
                name,
                "stream_options can only be used with stream",
            ));
        }
        Ok(
            match (options.include_usage, options.continuous_usage_stats) {
                (Some(true), Some(true)) => Self::Continuous,
                (Some(true), _) => Self::AtEnd,
                _ => Self::Never,
            },
        )
    }
}

/// What all choices of a request share when they are sent.
pub(crate) struct Common {
    request_id: String,
    n: usize,
    priority: i32,
    cache_salt: String,
    dp_rank: Option<u32>,
    deadline: Option<Instant>,
    route: Option<Arc<Route>>,
    trace_headers: HashMap<String, String>,
    stop: Vec<String>,
    include_stop: bool,
    detokenize: DetokenizeOptions,
    reasoning_ended: Option<bool>,
    /// The field that a constraint came from, if there is one.
    constraint: &'static str,
    /// Bytes that further choices may take.
    room: usize,
}

impl Common {
    /// Reads the fields.
    ///
    /// # Errors
    /// A field is out of range.
    pub(crate) fn new(
        shared: &Shared,
        head: &Head,
        arrival: &Arrival,
        model: &Model,
    ) -> Result<Self, ApiError> {
        let headers = &arrival.headers;
        sampling::refuse_unsupported(shared)?;
        if head.id.len() > MAX_ID || head.id.contains(char::is_control) {
            let message = format!(
                "request_id must be shorter than {MAX_ID} bytes, without control characters"
            );
            return Err(ApiError::invalid("request_id", message));
        }
        let priority = shared.priority.map_or(0, |Int(priority)| priority);
        let priority = i32::try_from(priority).map_err(|_| {
            ApiError::invalid(
                "priority",
                format!("priority must fit 32 bits, got {priority}"),
            )
        })?;
        let traces = ["traceparent", "tracestate"]
            .into_iter()
            .filter_map(|name| {
                Some((
                    name.to_owned(),
                    headers.get(name)?.to_str().ok()?.to_owned(),
                ))
            });
        Ok(Self {
            reasoning_ended: None,
            constraint: structured::field(shared),
            request_id: head.id.clone(),
            n: sampling::choices(shared)?,
            priority,
            cache_salt: cache_salt(shared)?,
            dp_rank: dp_rank(headers, model)?,
            deadline: arrival.deadline,
            route: route::read(
                headers,
                shared.user.as_deref(),
                arrival.told.as_ref(),
                arrival.rules,
            )?,
            room: MAX_CHOICE_BYTES,
            trace_headers: traces.collect(),
            stop: sampling::stop_strings(shared)?.to_vec(),
            include_stop: shared.include_stop_str_in_output.unwrap_or(false),
            detokenize: DetokenizeOptions {
                skip_special_tokens: shared.skip_special_tokens.unwrap_or(true),
                spaces_between_special_tokens: shared.spaces_between_special_tokens.unwrap_or(true),
            },
        })
    }

    /// Returns the number of choices per prompt.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// Says that a constraint holds for thoughts as well.
    pub(crate) fn constrain_thoughts(&mut self) {
        self.reasoning_ended = Some(true);
    }

    /// Says that the constraint comes from the tools, whatever else the request asked for.
    pub(crate) fn constrain_by_tools(&mut self) {
        self.constraint = "tools";
    }

    /// Keeps special tokens in the text, for parsers that look for them.
    pub(crate) fn keep_special_tokens(&mut self) {
        self.detokenize.skip_special_tokens = false;
    }

    /// Returns the choices of one prompt, not begun.
    ///
    /// # Errors
    /// A stop string is empty, or the choices are too large together.
    pub(crate) fn choices(
        &mut self,
        model: &Arc<Model>,
        prompt: &Prompt,
        sampling: &Sampling,
    ) -> Result<Vec<Choice>, ApiError> {
        let request = GenerateRequest {
            request_id: self.request_id.clone(),
            prompt_tokens: prompt.to_bytes(),
            sampling: Some(sampling.clone()),
            cache_salt: self.cache_salt.clone(),
            priority: self.priority,
            dp_rank: self.dp_rank,
            lora: model.lora().to_owned(),
            trace_headers: self.trace_headers.clone(),
            reasoning_ended: self.reasoning_ended,
            ..GenerateRequest::default()
        };
        self.take_room(&request)?;
        let blocks = model.fleet.hash(&request, &prompt.tokens);
        let request = Arc::new(request);
        let siblings = Arc::new(Siblings::default());
        let tokenizer = &model.assets.tokenizer;
        let choice = |i: usize| {
            let mut request = Arc::clone(&request);
            if i > 0 && sampling.seed.is_some() {
                let sampling = Arc::make_mut(&mut request).sampling.as_mut();
                if let Some(seed) = sampling.and_then(|sampling| sampling.seed.as_mut()) {
                    // Choices with the same seed would be the same.
                    *seed = seed.wrapping_add(i as i64);
                }
            }
            let min_tokens = sampling.min_tokens as usize;
            let stop = StopStrings::new(self.stop.clone(), self.include_stop, min_tokens)
                .map_err(|error| ApiError::invalid("stop", error.to_string()))?;
            let detokenizer = tokenizer.detokenizer(&prompt.tokens, self.detokenize);
            let constraint = sampling
                .structured_outputs
                .as_ref()
                .map(|_| self.constraint);
            let text = OutputText::new(detokenizer, stop);
            let order = Order {
                request,
                blocks: Arc::clone(&blocks),
                route: self.route.clone(),
                siblings: Arc::clone(&siblings),
                deadline: self.deadline,
            };
            let fleet = Arc::clone(&model.fleet);
            Ok(Choice::new(fleet, order, text, constraint))
        };
        (0..self.n).map(choice).collect()
    }

    /// Counts what the choices of one prompt take: the same request as often as there are choices.
    fn take_room(&mut self, request: &GenerateRequest) -> Result<(), ApiError> {
        let sampling = request.sampling.as_ref();
        let sampled = sampling.map_or(0, |sampling| {
            let constraint = sampling.structured_outputs.as_ref();
            let constraint = constraint.and_then(|outputs| outputs.constraint.as_ref());
            sampling.extra_args_json.len()
                + constraint.map_or(0, structured::size)
                + size_of::<u32>()
                    * (sampling.allowed_token_ids.len() + sampling.stop_token_ids.len())
                + size_of::<(u32, f32)>() * sampling.logit_bias.len()
        });
        let bytes = self.n * (request.prompt_tokens.len() + sampled);
        match self.room.checked_sub(bytes) {
            Some(room) => {
                self.room = room;
                Ok(())
            }
            None => Err(ApiError::invalid(
                "n",
                format!(
                    "n={}: the choices would take more than {MAX_CHOICE_BYTES} bytes",
                    self.n
                ),
            )),
        }
    }
}

/// Reads the header that chooses a data-parallel rank.
fn dp_rank(headers: &HeaderMap, model: &Model) -> Result<Option<u32>, ApiError> {
    let name = "x-data-parallel-rank";
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let ranks = model.card.dp_size.max(1);
    let rank = value
        .to_str()
        .ok()
        .and_then(|rank| rank.trim().parse().ok());
    match rank.filter(|&rank| rank < ranks) {
        Some(rank) => Ok(Some(rank)),
        None => {
            let message = format!("{name} must be a number below {ranks}, got {value:?}");
            Err(ApiError::invalid(name, message))
        }
    }
}

fn cache_salt(shared: &Shared) -> Result<String, ApiError> {
    let Some(salt) = &shared.cache_salt else {
        return Ok(String::new());
    };
    let sound =
        (1..=MAX_SALT).contains(&salt.chars().count()) && !salt.contains(['@', '/', '\\', '\0']);
    if sound {
        return Ok(salt.clone());
    }
    let message = "cache_salt must be 1 to 128 characters without '@', '/', '\\' and NUL";
    Err(ApiError::invalid("cache_salt", message))
}
