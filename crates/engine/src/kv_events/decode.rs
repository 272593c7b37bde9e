//! From msgpack to events: maps that name their type (vLLM 0.27 and later), and arrays that begin with it (0.23).
//!
//! Keys and trailing positions that are not known are skipped, absent ones have their default.

use rmp::Marker;
use stator_common::events::Medium;

use super::{Batch, ExtraKey, KvEvent, Place, Removed, Spec, Stored};
use crate::wire::{Reader, WireError};

/// vLLM's fields in the order that arrays have them, after the type.
const STORED: [&[u8]; 11] = [
    b"block_hashes",
    b"parent_block_hash",
    b"token_ids",
    b"block_size",
    b"lora_id",
    b"medium",
    b"lora_name",
    b"extra_keys",
    b"group_idx",
    b"kv_cache_spec_kind",
    b"kv_cache_spec_sliding_window",
];
const REMOVED: [&[u8]; 3] = [b"block_hashes", b"medium", b"group_idx"];
const BATCH: [&[u8]; 3] = [b"ts", b"events", b"data_parallel_rank"];

/// Kinds of attention (`KVCacheSpecKind`, 0.32) whose prefix cache finds a prefix block by block.
const FULL: [&str; 3] = ["full_attention", "mla_attention", "sink_full_attention"];

/// Reads one batch.
///
/// # Errors
/// [`WireError`]: it is not one.
pub fn decode(payload: &[u8]) -> Result<Batch, WireError> {
    let mut reader = Reader::new(payload);
    let mut batch = Batch::default();
    fields(&mut reader, &BATCH, |name, reader| {
        match name {
            b"ts" => batch.stamp = reader.f64()?,
            b"events" => {
                for _ in 0..reader.array()? {
                    batch.events.extend(event(reader)?);
                }
            }
            b"data_parallel_rank" => batch.dp_rank = Some(reader.u32()?),
            _ => drop(reader.skip()?),
        }
        Ok(())
    })?;
    Ok(batch)
}

/// Reads the fields of a struct, written as a map or as an array with these positions. Nils are left out.
fn fields(
    reader: &mut Reader<'_>,
    positions: &[&[u8]],
    mut read: impl FnMut(&[u8], &mut Reader<'_>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let mut one = |name: &[u8], reader: &mut Reader<'_>| match reader.nil()? {
        true => Ok(()),
        false => read(name, reader),
    };
    if is_map(reader)? {
        for _ in 0..reader.map()? {
            let name = reader.str_bytes()?;
            one(name, reader)?;
        }
    } else {
        for at in 0..reader.array()? {
            one(positions.get(at).copied().unwrap_or_default(), reader)?;
        }
    }
    Ok(())
}

fn is_map(reader: &Reader<'_>) -> Result<bool, WireError> {
    let marker = reader.peek()?;
    Ok(matches!(
        marker,
        Marker::FixMap(_) | Marker::Map16 | Marker::Map32
    ))
}

/// Reads an event; `None`: of a kind that is not known.
fn event(reader: &mut Reader<'_>) -> Result<Option<KvEvent>, WireError> {
    // The type may stand anywhere in a map.
    let mut look = reader.clone();
    let mut kind: Option<Vec<u8>> = None;
    if is_map(&look)? {
        for _ in 0..look.map()? {
            if look.str_bytes()? == b"type" {
                kind = Some(look.str_bytes()?.to_vec());
                break;
            }
            look.skip()?;
        }
    } else if look.array()? > 0 {
        kind = Some(look.str_bytes()?.to_vec());
    }
    match kind.as_deref() {
        Some(b"BlockStored") => stored(reader).map(KvEvent::Stored).map(Some),
        Some(b"BlockRemoved") => removed(reader).map(KvEvent::Removed).map(Some),
        Some(b"AllBlocksCleared") => {
            reader.skip()?;
            Ok(Some(KvEvent::Cleared))
        }
        _ => {
            reader.skip()?;
            Ok(None)
        }
    }
}

fn tagged(positions: &[&'static [u8]]) -> Vec<&'static [u8]> {
    let mut all: Vec<&'static [u8]> = vec![b"type"];
    all.extend(positions);
    all
}

fn stored(reader: &mut Reader<'_>) -> Result<Stored, WireError> {
    let mut stored = Stored::default();
    fields(reader, &tagged(&STORED), |name, reader| {
        match name {
            b"block_hashes" => stored.hashes = hashes(reader)?,
            b"parent_block_hash" => stored.parent = Some(hash(reader)?),
            b"token_ids" => stored.tokens = tokens(reader)?,
            b"block_size" => stored.block_size = reader.u32()?,
            b"lora_name" => stored.lora = Some(reader.str("lora_name")?.to_owned()),
            b"extra_keys" => stored.extra_keys = extra_keys(reader)?,
            b"kv_cache_spec_kind" => {
                let kind = reader.str("kv_cache_spec_kind")?;
                stored.spec = match kind {
                    "unknown" => None,
                    kind if FULL.contains(&kind) => Some(Spec::Full),
                    _ => Some(Spec::Partial),
                };
            }
            _ => place(name, &mut stored.place, reader)?,
        }
        Ok(())
    })?;
    Ok(stored)
}

fn removed(reader: &mut Reader<'_>) -> Result<Removed, WireError> {
    let mut removed = Removed::default();
    fields(reader, &tagged(&REMOVED), |name, reader| match name {
        b"block_hashes" => {
            removed.hashes = hashes(reader)?;
            Ok(())
        }
        _ => place(name, &mut removed.place, reader),
    })?;
    Ok(removed)
}

fn place(name: &[u8], place: &mut Place, reader: &mut Reader<'_>) -> Result<(), WireError> {
    match name {
        b"medium" => {
            place.medium = match reader.str("medium")? {
                "GPU" => Medium::Gpu,
                "CPU" => Medium::Cpu,
                // Files and stores have names of their connectors' own.
                _ => Medium::Storage,
            };
        }
        b"group_idx" => place.group = Some(reader.u32()?),
        b"locality" => place.remote = reader.str("locality")? == "REMOTE",
        _ => drop(reader.skip()?),
    }
    Ok(())
}

fn hashes(reader: &mut Reader<'_>) -> Result<Vec<u64>, WireError> {
    let count = reader.array()?;
    (0..count).map(|_| hash(reader)).collect()
}

/// Reads a name: its last 64 bits as a number, or all of it as bytes (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`).
fn hash(reader: &mut Reader<'_>) -> Result<u64, WireError> {
    if matches!(reader.peek()?, Marker::Bin8 | Marker::Bin16 | Marker::Bin32) {
        let bytes = reader.blob()?;
        let last = &bytes[bytes.len().saturating_sub(8)..];
        return Ok(last
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    reader.number("a block hash")
}

fn tokens(reader: &mut Reader<'_>) -> Result<Vec<u32>, WireError> {
    let count = reader.array()?;
    (0..count).map(|_| reader.u32()).collect()
}

fn extra_keys(reader: &mut Reader<'_>) -> Result<Vec<Vec<ExtraKey>>, WireError> {
    let blocks = reader.array()?;
    (0..blocks)
        .map(|_| {
            if reader.nil()? {
                return Ok(Vec::new());
            }
            let count = reader.array()?;
            (0..count).map(|_| extra_key(reader)).collect()
        })
        .collect()
}

fn extra_key(reader: &mut Reader<'_>) -> Result<ExtraKey, WireError> {
    Ok(match reader.peek()? {
        Marker::FixArray(2) => {
            reader.array()?;
            ExtraKey::Media {
                id: reader.str("the id of media")?.to_owned(),
                offset: reader.number("an offset")?,
            }
        }
        Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => ExtraKey::Digest(reader.blob()?.to_vec()),
        Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
            ExtraKey::Text(reader.str("an extra key")?.to_owned())
        }
        // Of whatever kind: blocks that differ in it are different blocks.
        _ => ExtraKey::Digest(reader.skip()?.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_are_worse_than_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn an_empty_batch_and_events_of_unknown_kinds_are_no_news() {
        // [1.0, []]
        let empty = [0x92, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0x90];
        let batch = decode(&empty).unwrap();
        assert_eq!((batch.stamp, batch.events.len()), (1.0, 0));
        // [1.0, [{"x": 1, "type": "New"}, ["New", 2]], 3]
        let mut new = vec![0x93, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0x92];
        new.extend(b"\x82\xa1x\x01\xa4type\xa3New");
        new.extend(b"\x92\xa3New\x02\x03");
        let batch = decode(&new).unwrap();
        assert_eq!((batch.dp_rank, batch.events.len()), (Some(3), 0));
    }
}
