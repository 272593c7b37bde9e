//! Field positions, worked out once from a [`Schema`]: per struct, what each position means here.

use super::Writer;
use crate::schema::{Schema, SchemaError, Table};

#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) request: Box<[RequestSlot]>,
    /// Fields of `request` up to the last one without a default.
    pub(super) request_required: usize,
    pub(super) lora: Box<[LoraSlot]>,
    pub(super) outputs: Box<[OutputsSlot]>,
    pub(super) output: Box<[OutputSlot]>,
    pub(super) utility: Box<[UtilitySlot]>,
    pub(super) logprobs: Box<[LogprobsSlot]>,
    pub(super) prompt_logprobs: Box<[LogprobsSlot]>,
}

/// A position of `EngineCoreRequest`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RequestSlot {
    Id,
    Prompt,
    Sampling,
    ArrivalTime,
    Lora,
    CacheSalt,
    DpRank,
    ClientIndex,
    Wave,
    Priority,
    TraceHeaders,
    ReasoningEnded,
    AbortImmediately,
    /// A field that is never set here: its default, encoded.
    Default(Box<[u8]>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum LoraSlot {
    Name,
    Id,
    Path,
    Default(Box<[u8]>),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum OutputsSlot {
    EngineIndex,
    Outputs,
    SchedulerStats,
    Utility,
    Skip,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum OutputSlot {
    Id,
    Tokens,
    Logprobs,
    PromptLogprobs,
    Finish,
    StopReason,
    KvTransferParams,
    PrefillStats,
    Error,
    Skip,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum UtilitySlot {
    CallId,
    Failure,
    Result,
    Skip,
}

/// A position of `LogprobsLists` or `LogprobsTensors`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum LogprobsSlot {
    Tokens,
    Values,
    Ranks,
    Skip,
}

impl Layout {
    pub(super) fn new(schema: &Schema) -> Result<Self, SchemaError> {
        let required = |field: &crate::schema::Field| field.default.is_none();
        let fields = &schema.table("EngineCoreRequest")?.fields;
        use {LogprobsSlot as L, OutputSlot as O, OutputsSlot as S, UtilitySlot as U};
        Ok(Self {
            request: writer_slots(
                schema,
                "EngineCoreRequest",
                &[
                    ("request_id", RequestSlot::Id),
                    ("prompt_token_ids", RequestSlot::Prompt),
                    ("sampling_params", RequestSlot::Sampling),
                    ("arrival_time", RequestSlot::ArrivalTime),
                    ("lora_request", RequestSlot::Lora),
                    ("cache_salt", RequestSlot::CacheSalt),
                    ("data_parallel_rank", RequestSlot::DpRank),
                    ("client_index", RequestSlot::ClientIndex),
                    ("current_wave", RequestSlot::Wave),
                    ("priority", RequestSlot::Priority),
                    ("trace_headers", RequestSlot::TraceHeaders),
                    ("reasoning_ended", RequestSlot::ReasoningEnded),
                    ("abort_immediately", RequestSlot::AbortImmediately),
                ],
                // Required, and nil in a request that generates from tokens.
                &["mm_features", "pooling_params"],
                RequestSlot::Default,
            )?,
            request_required: fields.iter().rposition(required).map_or(0, |last| last + 1),
            lora: writer_slots(
                schema,
                "LoRARequest",
                &[
                    ("lora_name", LoraSlot::Name),
                    ("lora_int_id", LoraSlot::Id),
                    ("lora_path", LoraSlot::Path),
                ],
                &[],
                LoraSlot::Default,
            )?,
            outputs: reader_slots(
                schema,
                "EngineCoreOutputs",
                &[("outputs", S::Outputs)],
                &[
                    ("engine_index", S::EngineIndex),
                    ("scheduler_stats", S::SchedulerStats),
                    ("utility_output", S::Utility),
                ],
                S::Skip,
            )?,
            output: reader_slots(
                schema,
                "EngineCoreOutput",
                &[
                    ("request_id", O::Id),
                    ("new_token_ids", O::Tokens),
                    ("finish_reason", O::Finish),
                ],
                &[
                    ("new_logprobs", O::Logprobs),
                    ("new_prompt_logprobs_tensors", O::PromptLogprobs),
                    ("stop_reason", O::StopReason),
                    ("kv_transfer_params", O::KvTransferParams),
                    ("prefill_stats", O::PrefillStats),
                    ("error", O::Error),
                ],
                O::Skip,
            )?,
            utility: reader_slots(
                schema,
                "UtilityOutput",
                &[
                    ("call_id", U::CallId),
                    ("failure_message", U::Failure),
                    ("result", U::Result),
                ],
                &[],
                U::Skip,
            )?,
            logprobs: reader_slots(
                schema,
                "LogprobsLists",
                &[
                    ("logprob_token_ids", L::Tokens),
                    ("logprobs", L::Values),
                    ("sampled_token_ranks", L::Ranks),
                ],
                &[],
                L::Skip,
            )?,
            prompt_logprobs: reader_slots(
                schema,
                "LogprobsTensors",
                &[
                    ("logprob_token_ids", L::Tokens),
                    ("logprobs", L::Values),
                    ("selected_token_ranks", L::Ranks),
                ],
                &[],
                L::Skip,
            )?,
        })
    }
}

/// Maps a struct that is written: every known field must exist, every unknown one needs a default.
fn writer_slots<S: Clone>(
    schema: &Schema,
    name: &'static str,
    known: &[(&'static str, S)],
    nil: &[&str],
    default: impl Fn(Box<[u8]>) -> S,
) -> Result<Box<[S]>, SchemaError> {
    let table = schema.table(name)?;
    for (field, _) in known {
        require(schema, name, table, field)?;
    }
    let slots = table.fields.iter().map(|field| {
        if let Some((_, slot)) = known.iter().find(|(known, _)| *known == field.name) {
            return Ok(slot.clone());
        }
        let value = match &field.default {
            Some(value) => value,
            None if nil.contains(&field.name.as_str()) => &serde_json::Value::Null,
            None => {
                return Err(SchemaError::UnknownRequired {
                    version: schema.vllm_version.clone(),
                    name,
                    field: field.name.clone(),
                });
            }
        };
        let mut writer = Writer::default();
        writer.json(value);
        Ok(default(writer.bytes.into()))
    });
    slots.collect()
}

/// Maps a struct that is read: `required` fields must exist, `optional` ones may be missing from
/// this version, and all others are skipped.
fn reader_slots<S: Copy>(
    schema: &Schema,
    name: &'static str,
    required: &[(&'static str, S)],
    optional: &[(&'static str, S)],
    skip: S,
) -> Result<Box<[S]>, SchemaError> {
    let table = schema.table(name)?;
    for (field, _) in required {
        require(schema, name, table, field)?;
    }
    let known = required.iter().chain(optional);
    let slots = table.fields.iter().map(|field| {
        known
            .clone()
            .find(|(known, _)| *known == field.name)
            .map_or(skip, |(_, slot)| *slot)
    });
    Ok(slots.collect())
}

fn require(
    schema: &Schema,
    name: &'static str,
    table: &Table,
    field: &'static str,
) -> Result<(), SchemaError> {
    if table.fields.iter().any(|known| known.name == field) {
        return Ok(());
    }
    Err(SchemaError::NoField {
        version: schema.vllm_version.clone(),
        name,
        field,
    })
}
