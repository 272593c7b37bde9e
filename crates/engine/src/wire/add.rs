//! Writes ADD: one request, by field name, cut off after the last field that is not a default.

use bytes::Bytes;

use super::{
    Codec, Writer,
    layout::{LoraSlot, RequestSlot},
    utility,
};
use crate::{
    request::{Lora, Sampling},
    validate::Checked,
};

/// What the client adds to a request when it sends it.
#[derive(Debug, Clone, Copy)]
pub struct AddContext<'a> {
    /// The id under which the engine knows the request, unique among its live ones.
    pub engine_id: &'a str,
    /// Which of the addresses of the init message gets the outputs; a wrong one mutes the engine.
    pub client_index: u32,
    /// Wall clock, seconds since the epoch.
    pub arrival_time: f64,
    /// The wave of ranks that step together; 0 for all others.
    pub wave: u32,
}

impl Codec {
    /// Writes an ADD.
    pub fn encode_add(&self, checked: &Checked, context: AddContext<'_>) -> Bytes {
        let request = &checked.request;
        // A token takes at most five bytes, the rest of a plain request about 200.
        let mut writer = Writer::with_capacity(512 + 5 * request.prompt.len());
        let slots = &self.layout.request;
        let is_set = |slot: &RequestSlot| match slot {
            RequestSlot::Default(_) => false,
            RequestSlot::Lora => request.lora.is_some(),
            RequestSlot::CacheSalt => request.cache_salt.is_some(),
            RequestSlot::DpRank => request.dp_rank.is_some(),
            RequestSlot::ClientIndex => context.client_index != 0,
            RequestSlot::Wave => context.wave != 0,
            RequestSlot::Priority => request.priority != 0,
            RequestSlot::TraceHeaders => !request.trace_headers.is_empty(),
            RequestSlot::ReasoningEnded => request.reasoning_ended.is_some(),
            RequestSlot::AbortImmediately => request.abort_immediately,
            RequestSlot::Id
            | RequestSlot::Prompt
            | RequestSlot::Sampling
            | RequestSlot::ArrivalTime => true,
        };
        let len = slots.iter().rposition(is_set).map_or(0, |last| last + 1);
        let len = len.max(self.layout.request_required);
        writer.array(len);
        for slot in &slots[..len] {
            match slot {
                RequestSlot::Id => writer.str(context.engine_id),
                RequestSlot::Prompt => writer.ids(request.prompt.iter()),
                RequestSlot::Sampling => sampling(&mut writer, checked),
                RequestSlot::ArrivalTime => writer.f64(context.arrival_time),
                RequestSlot::Lora => match &request.lora {
                    Some(lora) => self.lora(&mut writer, lora),
                    None => writer.nil(),
                },
                RequestSlot::CacheSalt => match &request.cache_salt {
                    Some(salt) => writer.str(salt),
                    None => writer.nil(),
                },
                RequestSlot::DpRank => match request.dp_rank {
                    Some(rank) => writer.uint(u64::from(rank)),
                    None => writer.nil(),
                },
                RequestSlot::ClientIndex => writer.uint(u64::from(context.client_index)),
                RequestSlot::Wave => writer.uint(u64::from(context.wave)),
                RequestSlot::Priority => writer.int(i64::from(request.priority)),
                RequestSlot::TraceHeaders if request.trace_headers.is_empty() => writer.nil(),
                RequestSlot::TraceHeaders => {
                    writer.map(request.trace_headers.len());
                    for (name, value) in &request.trace_headers {
                        writer.str(name);
                        writer.str(value);
                    }
                }
                RequestSlot::ReasoningEnded => match request.reasoning_ended {
                    Some(ended) => writer.bool(ended),
                    None => writer.nil(),
                },
                RequestSlot::AbortImmediately => writer.bool(request.abort_immediately),
                RequestSlot::Default(value) => writer.raw(value),
            }
        }
        writer.bytes.into()
    }

    /// Returns an adapter as the argument of the utility `add_lora`.
    pub fn lora_arg(&self, lora: &Lora) -> serde_json::Value {
        let mut writer = Writer::default();
        self.lora(&mut writer, lora);
        utility::to_json(&writer.bytes).expect("an adapter is an array of plain values")
    }

    fn lora(&self, writer: &mut Writer, lora: &Lora) {
        writer.array(self.layout.lora.len());
        for slot in &self.layout.lora {
            match slot {
                LoraSlot::Name => writer.str(&lora.name),
                LoraSlot::Id => writer.uint(u64::from(lora.id)),
                LoraSlot::Path => writer.str(&lora.path),
                LoraSlot::Default(value) => writer.raw(value),
            }
        }
    }
}

/// Writes `SamplingParams`, a map by field name; the engine ignores names that it does not know
/// and takes its default for those that are missing.
fn sampling(writer: &mut Writer, checked: &Checked) {
    let sampling = &checked.request.sampling;
    let mut map = Entries::start(writer);
    // Not optional: without it the engine fails the request.
    map.key("max_tokens").uint(u64::from(sampling.max_tokens));
    numbers(&mut map, sampling);
    ids(&mut map, "stop_token_ids", &sampling.stop_token_ids);
    ids(
        &mut map,
        "_all_stop_token_ids",
        &sampling.all_stop_token_ids,
    );
    ids(&mut map, "allowed_token_ids", &sampling.allowed_token_ids);
    if let Some(eos) = sampling.eos_token_id {
        map.key("_eos_token_id").uint(u64::from(eos));
    }
    if sampling.ignore_eos {
        map.key("ignore_eos").bool(true);
    }
    if !sampling.logit_bias.is_empty() {
        let writer = map.key("logit_bias");
        writer.map(sampling.logit_bias.len());
        for (id, bias) in &sampling.logit_bias {
            writer.uint(u64::from(*id));
            writer.f64(f64::from(*bias));
        }
    }
    if !sampling.bad_words.is_empty() {
        let writer = map.key("_bad_words_token_ids");
        writer.array(sampling.bad_words.len());
        for word in &sampling.bad_words {
            writer.ids(word.iter().copied());
        }
    }
    if let Some(skip) = sampling.skip_reading_prefix_cache {
        map.key("skip_reading_prefix_cache").bool(skip);
    }
    if let Some(structured) = &checked.structured_outputs {
        map.key("structured_outputs").raw(structured);
    }
    if let Some(args) = &checked.extra_args {
        map.key("extra_args").raw(args);
    }
    map.end();
}

fn numbers(map: &mut Entries<'_>, sampling: &Sampling) {
    for (name, value) in [
        ("temperature", sampling.temperature),
        ("top_p", sampling.top_p),
        ("min_p", sampling.min_p),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
        ("repetition_penalty", sampling.repetition_penalty),
    ] {
        if let Some(value) = value {
            map.key(name).f64(value);
        }
    }
    for (name, value) in [
        ("top_k", sampling.top_k),
        ("seed", sampling.seed),
        ("logprobs", sampling.logprobs.map(i64::from)),
        ("prompt_logprobs", sampling.prompt_logprobs.map(i64::from)),
        (
            "min_tokens",
            (sampling.min_tokens > 0).then_some(i64::from(sampling.min_tokens)),
        ),
        (
            "thinking_token_budget",
            sampling.thinking_token_budget.map(i64::from),
        ),
    ] {
        if let Some(value) = value {
            map.key(name).int(value);
        }
    }
}

fn ids(map: &mut Entries<'_>, name: &str, ids: &[u32]) {
    if !ids.is_empty() {
        map.key(name).ids(ids.iter().copied());
    }
}

/// A map whose length is known only at its end.
struct Entries<'a> {
    writer: &'a mut Writer,
    start: usize,
    len: u16,
}

impl<'a> Entries<'a> {
    /// Marker of a map with a 16-bit length, which stands for any length below 65536.
    const MAP16: u8 = 0xde;

    fn start(writer: &'a mut Writer) -> Self {
        let start = writer.bytes.len();
        writer.raw(&[Self::MAP16, 0, 0]);
        Self {
            writer,
            start,
            len: 0,
        }
    }

    fn key(&mut self, name: &str) -> &mut Writer {
        self.len += 1;
        self.writer.str(name);
        self.writer
    }

    fn end(self) {
        let [high, low] = self.len.to_be_bytes();
        self.writer.bytes[self.start + 1] = high;
        self.writer.bytes[self.start + 2] = low;
    }
}
