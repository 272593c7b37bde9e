//! What a rank tells the coordinator: an `EngineCoreOutputs` without outputs.

use crate::{
    schema::{Schema, SchemaError},
    wire::{Reader, WireError},
};

/// Positions in `EngineCoreOutputs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    rank: Option<usize>,
    complete: usize,
    start: usize,
}

/// What a rank tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) rank: u32,
    /// All ranks have gone to sleep after this wave. Told by rank 0.
    pub(super) complete: Option<u32>,
    /// This wave has to begin, or has begun.
    pub(super) start: Option<u32>,
}

impl Layout {
    pub(crate) fn new(schema: &Schema) -> Result<Self, SchemaError> {
        let name = "EngineCoreOutputs";
        let fields = &schema.table(name)?.fields;
        let find = |field: &str| fields.iter().position(|known| known.name == field);
        let need = |field: &'static str| {
            find(field).ok_or_else(|| SchemaError::NoField {
                version: schema.vllm_version.clone(),
                name,
                field,
            })
        };
        Ok(Self {
            rank: find("engine_index"),
            complete: need("wave_complete")?,
            start: need("start_wave")?,
        })
    }

    /// Reads a notice; load statistics come the same way and are passed over.
    pub(super) fn read(&self, bytes: &[u8]) -> Result<Notice, WireError> {
        let mut reader = Reader::new(bytes);
        let mut notice = Notice::default();
        for position in 0..reader.array()? {
            if reader.nil()? {
                continue;
            }
            if Some(position) == self.rank {
                notice.rank = reader.u32()?;
            } else if position == self.complete {
                notice.complete = Some(reader.u32()?);
            } else if position == self.start {
                notice.start = Some(reader.u32()?);
            } else {
                reader.skip()?;
            }
        }
        Ok(notice)
    }
}
