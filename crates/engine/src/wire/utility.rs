//! Reads the answers to utility calls, the one place where the engine's values are free-form.

use serde_json::Value;

use super::{
    layout::UtilitySlot,
    read::{Reader, WireError},
};
use crate::output::UtilityOutput;

/// Levels of a result; the results that vLLM has nest three deep.
const MAX_NESTING: usize = 64;

/// Reads a `UtilityOutput`: the call's id, and its result or why it failed.
pub(super) fn output(
    reader: &mut Reader<'_>,
    slots: &[UtilitySlot],
) -> Result<UtilityOutput, WireError> {
    let mut call_id = None;
    let mut failure = None;
    let mut result = Value::Null;
    for position in 0..reader.array()? {
        match slots.get(position).unwrap_or(&UtilitySlot::Skip) {
            UtilitySlot::CallId => call_id = Some(reader.number("a call's id")?),
            UtilitySlot::Failure if reader.nil()? => {}
            UtilitySlot::Failure => failure = Some(reader.str("failure message")?.to_owned()),
            UtilitySlot::Result if reader.nil()? => {}
            // [type information or nil, result]
            UtilitySlot::Result => {
                for part in 0..reader.array()? {
                    match part {
                        1 => result = value(reader, MAX_NESTING)?,
                        _ => drop(reader.skip()?),
                    }
                }
            }
            UtilitySlot::Skip => drop(reader.skip()?),
        }
    }
    Ok(UtilityOutput {
        call_id: call_id.ok_or(WireError::Missing {
            message: "utility output",
            field: "call_id",
        })?,
        result: failure.map_or(Ok(result), Err),
    })
}

/// Reads one msgpack value as JSON.
pub(crate) fn to_json(bytes: &[u8]) -> Result<Value, WireError> {
    value(&mut Reader::new(bytes), MAX_NESTING)
}

/// Keys that are not strings become their text, binary data an array of numbers, and floats that
/// JSON lacks null.
fn value(reader: &mut Reader<'_>, depth: usize) -> Result<Value, WireError> {
    use rmp::Marker as M;
    let depth = depth
        .checked_sub(1)
        .ok_or(WireError::TooDeep { limit: MAX_NESTING })?;
    Ok(match reader.peek()? {
        M::Null | M::Reserved => {
            reader.skip()?;
            Value::Null
        }
        M::True | M::False => Value::Bool(reader.bool()?),
        M::F32 | M::F64 => reader.f64()?.into(),
        M::FixStr(_) | M::Str8 | M::Str16 | M::Str32 => {
            String::from_utf8_lossy(reader.str_bytes()?).into()
        }
        M::FixArray(_) | M::Array16 | M::Array32 => (0..reader.array()?)
            .map(|_| value(reader, depth))
            .collect::<Result<_, _>>()
            .map(Value::Array)?,
        M::FixMap(_) | M::Map16 | M::Map32 => (0..reader.map()?)
            .map(|_| {
                let key = match value(reader, depth)? {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                Ok((key, value(reader, depth)?))
            })
            .collect::<Result<_, WireError>>()
            .map(Value::Object)?,
        M::U64 => reader.number::<u64>("an unsigned 64-bit integer")?.into(),
        M::FixPos(_) | M::FixNeg(_) | M::U8 | M::U16 | M::U32 => integer(reader)?,
        M::I8 | M::I16 | M::I32 | M::I64 => integer(reader)?,
        _ => reader.blob()?.into(),
    })
}

fn integer(reader: &mut Reader<'_>) -> Result<Value, WireError> {
    Ok(reader.number::<i64>("a 64-bit integer")?.into())
}
