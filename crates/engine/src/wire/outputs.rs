//! Reads the engine's outputs: the hot path, once per engine step.
//!
//! Allocates what it returns and nothing else; a field that nobody reads is one `skip`.

use bytes::Bytes;
use smallvec::SmallVec;

use super::{
    Codec, ENGINE_CORE_DEAD,
    layout::{OutputSlot, OutputsSlot},
    read::{Reader, WireError},
    tensor, utility,
};
use crate::output::{Batch, Finish, Message, Output, RequestError, RequestKey, SchedulerStats};

impl Codec {
    /// Reads one message of the engine.
    ///
    /// - `frames`: as received; tensors lie in the frames after the first.
    /// - `resolve`: the live request of an engine id, if there is one. Outputs of ids that have
    ///   none are dropped; unfinished ones are listed in [`Batch::orphans`].
    ///
    /// # Errors
    /// [`WireError`], when the message is not what this version's engine sends. Fields and keys
    /// that are new are no error.
    pub fn decode_outputs(
        &self,
        frames: &[Bytes],
        mut resolve: impl FnMut(&[u8]) -> Option<RequestKey>,
    ) -> Result<Message, WireError> {
        let first = frames.first().ok_or(WireError::NoFrames)?;
        if frames.len() == 1 && first == ENGINE_CORE_DEAD {
            return Ok(Message::Dead);
        }
        let mut batch = Batch::default();
        let mut reader = Reader::new(first);
        for position in 0..reader.array()? {
            let slot = self.layout.outputs.get(position);
            match slot.unwrap_or(&OutputsSlot::Skip) {
                OutputsSlot::EngineIndex => {
                    // -1 would be a message for the coordinator, which comes elsewhere.
                    batch.engine_index = reader.u32()?;
                }
                OutputsSlot::Outputs => {
                    let len = reader.array()?;
                    batch.outputs.reserve_exact(len);
                    for _ in 0..len {
                        self.output(&mut reader, frames, &mut resolve, &mut batch)?;
                    }
                }
                OutputsSlot::SchedulerStats if reader.nil()? => {}
                OutputsSlot::SchedulerStats => batch.stats = Some(stats(&mut reader)?),
                OutputsSlot::Utility if reader.nil()? => {}
                OutputsSlot::Utility => {
                    batch.utility = Some(utility::output(&mut reader, &self.layout.utility)?);
                }
                OutputsSlot::Skip => drop(reader.skip()?),
            }
        }
        Ok(Message::Batch(batch))
    }

    fn output<'a>(
        &self,
        reader: &mut Reader<'a>,
        frames: &'a [Bytes],
        resolve: &mut impl FnMut(&[u8]) -> Option<RequestKey>,
        batch: &mut Batch,
    ) -> Result<(), WireError> {
        let mut id = None;
        let mut output = Output {
            key: RequestKey(0),
            tokens: SmallVec::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: None,
            stop_token: None,
            cached_tokens: None,
            kv_transfer_params: None,
            error: None,
        };
        for position in 0..reader.array()? {
            let slot = self
                .layout
                .output
                .get(position)
                .unwrap_or(&OutputSlot::Skip);
            if reader.nil()? {
                continue;
            }
            match slot {
                OutputSlot::Skip => drop(reader.skip()?),
                OutputSlot::Id => id = Some(reader.str_bytes()?),
                OutputSlot::Tokens => {
                    for _ in 0..reader.array()? {
                        output.tokens.push(reader.u32()?);
                    }
                }
                OutputSlot::Logprobs => {
                    let read = tensor::logprobs(reader, frames, &self.layout.logprobs)?;
                    output.logprobs = Some(Box::new(read));
                }
                OutputSlot::PromptLogprobs => {
                    let read = tensor::logprobs(reader, frames, &self.layout.prompt_logprobs)?;
                    output.prompt_logprobs = Some(Box::new(read));
                }
                OutputSlot::Finish => output.finish = Some(finish(reader)?),
                OutputSlot::StopReason => output.stop_token = stop_token(reader)?,
                OutputSlot::KvTransferParams => {
                    output.kv_transfer_params = Some(frames[0].slice_ref(reader.skip()?));
                }
                OutputSlot::PrefillStats => output.cached_tokens = cached_tokens(reader)?,
                OutputSlot::Error => output.error = Some(Box::new(error(reader)?)),
            }
        }
        let id = id.ok_or(WireError::Missing {
            message: "output",
            field: "request_id",
        })?;
        match resolve(id) {
            Some(key) => {
                output.key = key;
                batch.outputs.push(output);
            }
            None if output.finish.is_none() => batch.orphans.push(frames[0].slice_ref(id)),
            None => {}
        }
        Ok(())
    }
}

fn finish(reader: &mut Reader<'_>) -> Result<Finish, WireError> {
    let at = reader.position();
    Ok(match reader.int()? {
        0 => Finish::Stop,
        1 => Finish::Length,
        2 => Finish::Abort,
        3 => Finish::Error,
        4 => Finish::Repetition,
        _ => {
            return Err(WireError::Range {
                at,
                expected: "a finish reason",
            });
        }
    })
}

/// A stop reason is a token, or a text (a stop string, "repetition_detected") that is not read.
fn stop_token(reader: &mut Reader<'_>) -> Result<Option<u32>, WireError> {
    use rmp::Marker as M;
    match reader.peek()? {
        M::FixStr(_) | M::Str8 | M::Str16 | M::Str32 => {
            reader.skip()?;
            Ok(None)
        }
        _ => Ok(Some(reader.u32()?)),
    }
}

fn cached_tokens(reader: &mut Reader<'_>) -> Result<Option<u32>, WireError> {
    let mut cached = None;
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"num_cached_tokens" => cached = Some(reader.u32()?),
            _ => drop(reader.skip()?),
        }
    }
    Ok(cached)
}

fn error(reader: &mut Reader<'_>) -> Result<RequestError, WireError> {
    let (mut code, mut message, mut retryable) = (String::new(), String::new(), false);
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"code" => reader.str("error code")?.clone_into(&mut code),
            b"message" => reader.str("error message")?.clone_into(&mut message),
            b"retryable" => retryable = reader.bool()?,
            _ => drop(reader.skip()?),
        }
    }
    Ok(RequestError {
        code,
        message,
        retryable,
    })
}

fn stats(reader: &mut Reader<'_>) -> Result<SchedulerStats, WireError> {
    let mut stats = SchedulerStats::default();
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"num_running_reqs" => stats.running = reader.u32()?,
            b"num_waiting_reqs" | b"num_skipped_waiting_reqs" => {
                stats.waiting = stats.waiting.saturating_add(reader.u32()?);
            }
            b"kv_cache_usage" => stats.kv_usage = reader.f64()?,
            b"prefix_cache_stats" if reader.nil()? => {}
            b"prefix_cache_stats" => prefix_cache(reader, &mut stats)?,
            b"kv_connector_stats" if reader.nil()? => {}
            b"kv_connector_stats" => kv_transfers(reader, &mut stats)?,
            _ => drop(reader.skip()?),
        }
    }
    Ok(stats)
}

/// Reads what NIXL's connectors say: lists with an entry per transfer (`nixl/stats.py`, 0.32). Of others, and of
/// connectors within a `MultiConnector`, nothing is known here.
fn kv_transfers(reader: &mut Reader<'_>, stats: &mut SchedulerStats) -> Result<(), WireError> {
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"transfer_duration" => {
                for _ in 0..reader.array()? {
                    stats.transfers += 1;
                    stats.transfer_seconds += reader.f64()?;
                }
            }
            b"bytes_transferred" => {
                for _ in 0..reader.array()? {
                    stats.transferred_bytes += reader.number::<u64>("a number of bytes")?;
                }
            }
            _ => drop(reader.skip()?),
        }
    }
    Ok(())
}

fn prefix_cache(reader: &mut Reader<'_>, stats: &mut SchedulerStats) -> Result<(), WireError> {
    const COUNT: &str = "an unsigned 64-bit integer";
    for _ in 0..reader.map()? {
        match reader.str_bytes()? {
            b"queries" => stats.prefix_queries = reader.number(COUNT)?,
            b"hits" => stats.prefix_hits = reader.number(COUNT)?,
            b"preempted_requests" => stats.preempted = reader.number(COUNT)?,
            _ => drop(reader.skip()?),
        }
    }
    Ok(())
}
