//! Outputs as `EngineCoreOutputs` arrays, with arrays of numbers beside them.

use bytes::Bytes;

use super::WireVersion;
use super::msgpack::{self, Value};
use crate::model::Logprobs;
use crate::scheduler::{Event, Output, PrefillStats, Stats};

/// Arrays of at least so many bytes travel as frames of their own
/// (`VLLM_MSGPACK_ZERO_COPY_THRESHOLD`, v1/serial_utils.py).
const ZERO_COPY_THRESHOLD: usize = 256;

/// Extension code of inline array data (v1/serial_utils.py, `CUSTOM_TYPE_RAW_VIEW`).
const RAW_VIEW: i8 = 3;

/// What an engine says when it dies.
pub const ENGINE_CORE_DEAD: &[u8] = b"ENGINE_CORE_DEAD";

/// How outputs are laid out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layout {
    pub version: WireVersion,
    /// Unknown fields appended to every output, as a later version might.
    pub extra_fields: usize,
    pub engine_index: u32,
}

/// An output with the hand-off parameters that belong to it.
#[derive(Debug)]
pub struct Answer {
    pub output: Output,
    pub kv_transfer_params: Option<Value>,
}

/// What one message says.
#[derive(Debug, Default)]
pub struct Batch {
    pub answers: Vec<Answer>,
    pub stats: Option<Stats>,
    /// Seconds on the monotonic clock.
    pub timestamp: f64,
    pub utility: Option<UtilityResult>,
    /// Whether the ids of ended requests are listed (aborts and refusals).
    pub list_finished: bool,
    pub weight_version: Option<String>,
}

/// The answer to a utility call.
#[derive(Clone, Debug, PartialEq)]
pub struct UtilityResult {
    pub call_id: Value,
    pub result: Result<Value, String>,
}

impl Layout {
    /// The frames of a message: msgpack first, large arrays after it.
    #[must_use]
    pub fn encode(&self, batch: &Batch) -> Vec<Bytes> {
        let mut out = Vec::with_capacity(64 + 600 * usize::from(batch.stats.is_some()));
        let mut frames = vec![Bytes::new()];
        msgpack::array(&mut out, self.version.outputs_fields() + self.extra_fields);
        msgpack::uint(&mut out, u64::from(self.engine_index));
        msgpack::array(&mut out, batch.answers.len());
        for answer in &batch.answers {
            self.answer(&mut out, &mut frames, answer);
        }
        match &batch.stats {
            Some(stats) => self.stats(&mut out, stats),
            None => msgpack::nil(&mut out),
        }
        msgpack::float(&mut out, batch.timestamp);
        match &batch.utility {
            Some(utility) => write_utility(&mut out, utility),
            None => msgpack::nil(&mut out),
        }
        if batch.list_finished {
            msgpack::array(&mut out, batch.answers.len());
            for answer in &batch.answers {
                msgpack::str(&mut out, &answer.output.id);
            }
        } else {
            msgpack::nil(&mut out);
        }
        msgpack::nils(&mut out, 2); // wave_complete, start_wave
        if self.version != WireVersion::V0_27 {
            Value::from(batch.weight_version.as_deref().map(str::to_owned)).write(&mut out);
        }
        self.extra(&mut out);
        frames[0] = Bytes::from(out);
        frames
    }

    fn answer(&self, out: &mut Vec<u8>, frames: &mut Vec<Bytes>, answer: &Answer) {
        let output = &answer.output;
        msgpack::array(out, self.version.output_fields() + self.extra_fields);
        msgpack::str(out, &output.id);
        msgpack::array(out, output.tokens.len());
        for &token in &output.tokens {
            msgpack::uint(out, u64::from(token));
        }
        match &output.logprobs {
            Some(rows) => write_logprobs(out, frames, rows),
            None => msgpack::nil(out),
        }
        match &output.prompt_logprobs {
            Some(rows) => self.prompt_logprobs(out, frames, rows),
            None => msgpack::nil(out),
        }
        msgpack::nil(out); // pooling_output
        match output.finish {
            Some(finish) => msgpack::uint(out, finish as u64),
            None => msgpack::nil(out),
        }
        Value::from(output.stop_token).write(out);
        write_events(out, &output.events);
        match &answer.kv_transfer_params {
            Some(params) => params.write(out),
            None => msgpack::nil(out),
        }
        msgpack::nils(out, 2); // ec_transfer_params, trace_headers
        match &output.prefill {
            Some(stats) => write_prefill(out, stats),
            None => msgpack::nil(out),
        }
        msgpack::nil(out); // routed_experts
        msgpack::uint(out, 0); // num_nans_in_logits
        match (self.version, &output.refusal) {
            (WireVersion::V0_33, Some(refusal)) => {
                msgpack::nils(out, 4);
                Value::map([
                    ("code", refusal.code.into()),
                    ("message", refusal.message.into()),
                    ("retryable", refusal.retryable.into()),
                ])
                .write(out);
            }
            // Everything that later versions appended is absent.
            (version, _) => msgpack::nils(out, version.output_fields() - 14),
        }
        self.extra(out);
    }

    /// `LogprobsTensors`: torch's names of types, and a fifth element since 0.32.
    fn prompt_logprobs(&self, out: &mut Vec<u8>, frames: &mut Vec<Bytes>, rows: &[Logprobs]) {
        let width = rows.first().map_or(0, |row| row.tokens.len());
        let newer = usize::from(self.version != WireVersion::V0_27);
        msgpack::array(out, 4 + newer);
        write_array(
            out,
            frames,
            "int32",
            &[rows.len(), width],
            token_bytes(rows),
        );
        write_array(
            out,
            frames,
            "float32",
            &[rows.len(), width],
            logprob_bytes(rows),
        );
        let ranks = rows.iter().flat_map(|row| (row.rank as i32).to_le_bytes());
        write_array(out, frames, "int32", &[rows.len()], ranks.collect());
        msgpack::nils(out, 1 + newer);
    }

    fn stats(&self, out: &mut Vec<u8>, stats: &Stats) {
        let newer = self.version != WireVersion::V0_27;
        msgpack::map(out, if newer { 18 } else { 16 });
        let count = |out: &mut Vec<u8>, key: &str, value: usize| {
            msgpack::str(out, key);
            msgpack::uint(out, value as u64);
        };
        count(out, "num_running_reqs", stats.running);
        count(out, "num_waiting_reqs", stats.waiting);
        count(out, "num_skipped_waiting_reqs", 0);
        if newer {
            msgpack::str(out, "num_kv_fetch_reqs_by_stage");
            msgpack::map(out, 0);
        }
        count(out, "step_counter", 0);
        count(out, "current_wave", 0);
        msgpack::str(out, "kv_cache_usage");
        msgpack::float(out, stats.kv_usage);
        absent(out, &["iteration_details"]);
        msgpack::str(out, "prefix_cache_stats");
        msgpack::map(out, if newer { 8 } else { 7 });
        msgpack::str(out, "reset");
        msgpack::bool(out, false);
        count(out, "requests", stats.cache_requests);
        count(out, "queries", stats.cache_queries);
        count(out, "hits", stats.cache_hits);
        count(out, "preempted_requests", 0);
        count(out, "preempted_queries", 0);
        count(out, "preempted_hits", 0);
        if newer {
            msgpack::str(out, "hits_by_source");
            msgpack::map(out, 0);
        }
        absent(out, &["connector_prefix_cache_stats"]);
        msgpack::str(out, "kv_cache_eviction_events");
        msgpack::array(out, 0);
        absent(out, &["spec_decoding_stats", "kv_connector_stats"]);
        if newer {
            absent(out, &["ec_connector_stats"]);
        }
        for key in ["waiting_lora_adapters", "running_lora_adapters"] {
            msgpack::str(out, key);
            msgpack::map(out, 0);
        }
        absent(out, &["cudagraph_stats", "perf_stats"]);
    }

    fn extra(&self, out: &mut Vec<u8>) {
        for index in 0..self.extra_fields {
            Value::map([("field_of_the_future", Value::from(index))]).write(out);
        }
    }
}

fn absent(out: &mut Vec<u8>, keys: &[&str]) {
    for key in keys {
        msgpack::str(out, key);
        msgpack::nil(out);
    }
}

fn write_utility(out: &mut Vec<u8>, utility: &UtilityResult) {
    msgpack::array(out, 3);
    utility.call_id.write(out);
    match &utility.result {
        Ok(result) => {
            msgpack::nil(out);
            msgpack::array(out, 2);
            msgpack::nil(out); // no type information without insecure serialization
            result.write(out);
        }
        Err(message) => {
            msgpack::str(out, message);
            msgpack::nil(out);
        }
    }
}

fn write_events(out: &mut Vec<u8>, events: &[Event]) {
    if events.is_empty() {
        msgpack::nil(out);
        return;
    }
    msgpack::array(out, events.len());
    for event in events {
        msgpack::map(out, 2);
        msgpack::str(out, "type");
        msgpack::uint(out, event.kind as u64);
        msgpack::str(out, "timestamp");
        msgpack::float(out, event.at);
    }
}

fn write_prefill(out: &mut Vec<u8>, stats: &PrefillStats) {
    let cached = stats.local_cached + stats.external_cached;
    Value::map([
        ("num_prompt_tokens", stats.prompt.into()),
        ("num_computed_tokens", (stats.prompt - cached).into()),
        ("num_cached_tokens", cached.into()),
        ("num_local_cached_tokens", stats.local_cached.into()),
        ("num_external_cached_tokens", stats.external_cached.into()),
        ("num_cache_creation_tokens", stats.created.into()),
    ])
    .write(out);
}

/// `LogprobsLists`: numpy's names of types.
fn write_logprobs(out: &mut Vec<u8>, frames: &mut Vec<Bytes>, rows: &[Logprobs]) {
    let width = rows.first().map_or(0, |row| row.tokens.len());
    msgpack::array(out, 4);
    write_array(out, frames, "<i4", &[rows.len(), width], token_bytes(rows));
    write_array(
        out,
        frames,
        "<f4",
        &[rows.len(), width],
        logprob_bytes(rows),
    );
    let ranks = rows.iter().flat_map(|row| (row.rank as i64).to_le_bytes());
    write_array(out, frames, "<i8", &[rows.len()], ranks.collect());
    msgpack::nil(out); // cu_num_generated_tokens
}

fn token_bytes(rows: &[Logprobs]) -> Vec<u8> {
    let tokens = rows.iter().flat_map(|row| &row.tokens);
    tokens.flat_map(|token| token.to_le_bytes()).collect()
}

fn logprob_bytes(rows: &[Logprobs]) -> Vec<u8> {
    let logprobs = rows.iter().flat_map(|row| &row.logprobs);
    logprobs.flat_map(|logprob| logprob.to_le_bytes()).collect()
}

fn write_array(
    out: &mut Vec<u8>,
    frames: &mut Vec<Bytes>,
    dtype: &str,
    shape: &[usize],
    data: Vec<u8>,
) {
    msgpack::array(out, 3);
    msgpack::str(out, dtype);
    msgpack::array(out, shape.len());
    for &len in shape {
        msgpack::uint(out, len as u64);
    }
    if data.len() < ZERO_COPY_THRESHOLD {
        msgpack::ext(out, RAW_VIEW, &data);
    } else {
        msgpack::uint(out, frames.len() as u64);
        frames.push(Bytes::from(data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Finish;

    fn batch(tokens: Vec<u32>, top: usize) -> Batch {
        let row = |token| Logprobs {
            tokens: vec![token; top + 1],
            logprobs: vec![-0.5; top + 1],
            rank: 1,
        };
        let output = Output {
            logprobs: Some(tokens.iter().map(|&token| row(token)).collect()),
            tokens,
            ..Output::ended("r".into(), 0, Finish::Length)
        };
        Batch {
            answers: vec![Answer {
                output,
                kv_transfer_params: None,
            }],
            stats: Some(Stats::default()),
            ..Batch::default()
        }
    }

    #[test]
    fn every_version_has_its_number_of_fields() {
        for (version, outputs, output) in [
            (WireVersion::V0_27, 8, 14),
            (WireVersion::V0_32, 9, 18),
            (WireVersion::V0_33, 9, 19),
        ] {
            let layout = Layout {
                version,
                extra_fields: 2,
                engine_index: 0,
            };
            let value = msgpack::decode(&layout.encode(&batch(vec![7], 1))[0]).unwrap();
            let fields = value.as_array().unwrap();
            assert_eq!(fields.len(), outputs + 2);
            let answer = &fields[1].as_array().unwrap()[0];
            assert_eq!(answer.as_array().unwrap().len(), output + 2);
        }
    }

    #[test]
    fn large_arrays_travel_in_frames_of_their_own() {
        let layout = Layout::default();
        assert_eq!(layout.encode(&batch(vec![7], 62)).len(), 1);
        let frames = layout.encode(&batch(vec![7], 63));
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1][..8], [7, 0, 0, 0, 7, 0, 0, 0]);
        let value = msgpack::decode(&frames[0]).unwrap();
        let answer = value.as_array().unwrap()[1].as_array().unwrap()[0].clone();
        let logprobs = answer.as_array().unwrap()[2].as_array().unwrap()[1].clone();
        assert_eq!(
            logprobs,
            Value::Array(vec![
                "<f4".into(),
                Value::from(vec![1u32, 64]),
                Value::Int(2)
            ])
        );
    }
}
