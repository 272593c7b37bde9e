//! EngineCore's own messages, in both directions.
//!
//! To the engine: `[identity, type, msgpack]` ([`ADD`], [`ABORT`], [`UTILITY`]); from it:
//! `[msgpack, tensor data...]` or [`ENGINE_CORE_DEAD`]. Requests are written by field name and
//! outputs read by field name, both through positions that come from a [`Schema`], so that fields
//! which a release adds or moves change nothing here. What nobody reads is passed over without
//! being decoded. Mirrors vLLM's `v1/engine/__init__.py` and `v1/serial_utils.py`.

mod add;
mod handshake;
mod layout;
mod outputs;
mod params;
mod read;
mod tensor;
mod utility;
mod write;

use bytes::Bytes;

pub use add::AddContext;
pub use handshake::{
    Handshake, KvEvents, Ready, Status, decode_handshake, decode_ready, encode_init,
};
pub use params::ParamsError;
pub use read::{TensorError, WireError};

pub(crate) use handshake::encode_init_of;
pub(crate) use params::check_params;
pub(crate) use read::Reader;
#[cfg(test)]
pub(crate) use utility::to_json;
pub(crate) use write::Writer;

use crate::schema::{Schema, SchemaError};

/// Message types, the second frame to the engine (`EngineCoreRequestType`).
pub const ADD: &[u8] = b"\x00";
pub const ABORT: &[u8] = b"\x01";
pub const UTILITY: &[u8] = b"\x03";

/// The only frame of the engine's last message.
pub const ENGINE_CORE_DEAD: &[u8] = b"ENGINE_CORE_DEAD";

/// Encodes and decodes messages of one engine version.
#[derive(Debug, Clone)]
pub struct Codec {
    layout: layout::Layout,
}

impl Codec {
    /// # Errors
    /// [`SchemaError`], when the version's structs lack what every request needs.
    pub fn new(schema: &Schema) -> Result<Self, SchemaError> {
        Ok(Self {
            layout: layout::Layout::new(schema)?,
        })
    }

    /// Writes an ABORT of requests by their engine ids. Unknown ids are ignored by the engine,
    /// and a live one ends without a further output.
    pub fn encode_abort<'a>(&self, ids: impl ExactSizeIterator<Item = &'a str>) -> Bytes {
        let mut writer = Writer::default();
        writer.array(ids.len());
        ids.for_each(|id| writer.str(id));
        writer.bytes.into()
    }

    /// Writes a call of a method of the engine, by position.
    pub fn encode_utility(
        &self,
        client_index: u32,
        call_id: i64,
        method: &str,
        args: &[serde_json::Value],
    ) -> Bytes {
        let mut writer = Writer::default();
        writer.array(4);
        writer.uint(u64::from(client_index));
        writer.int(call_id);
        writer.str(method);
        writer.array(args.len());
        args.iter().for_each(|arg| writer.json(arg));
        writer.bytes.into()
    }
}
