//! The top level of `kv_transfer_params`, walked in place.

use bytes::Bytes;
use rmp::Marker;

use crate::wire::{ParamsError, Reader, Writer, check_params};

/// What a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string that is not empty.
    Text,
    Int,
    True,
    /// An array that is not empty.
    Filled,
}

/// The entries of one map, their values unread.
pub(super) struct Entries<'a>(Vec<(&'a str, &'a [u8])>);

impl<'a> Entries<'a> {
    /// # Errors
    /// [`ParamsError`], when this is not one map that the engine decodes.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ParamsError> {
        check_params(bytes)?;
        let mut reader = Reader::new(bytes);
        let mut entries = Vec::new();
        for _ in 0..reader.map()? {
            let key = reader.str("a key")?;
            entries.push((key, reader.skip()?));
        }
        Ok(Self(entries))
    }

    /// The later of two entries counts, as in Python.
    fn value(&self, key: &str) -> Option<Reader<'a>> {
        let mut entries = self.0.iter().rev();
        let (_, value) = entries.find(|(name, _)| *name == key)?;
        Some(Reader::new(value))
    }

    pub(super) fn has(&self, key: &str, kind: Kind) -> bool {
        let Some(mut value) = self.value(key) else {
            return false;
        };
        match kind {
            Kind::Text => value.str_bytes().is_ok_and(|text| !text.is_empty()),
            Kind::Int => value.int().is_ok(),
            Kind::True => value.bool() == Ok(true),
            Kind::Filled => value.array().is_ok_and(|len| len > 0),
        }
    }

    pub(super) fn number(&self, key: &str) -> Option<f64> {
        let mut value = self.value(key)?;
        match value.peek().ok()? {
            Marker::Null => None,
            _ => value.f64().ok(),
        }
    }

    /// Returns the map with an entry more, or another value of an entry.
    pub(super) fn with_text(&self, key: &str, text: &str) -> Bytes {
        let others = || self.0.iter().filter(|(name, _)| *name != key);
        let mut writer = Writer::default();
        writer.map(others().count() + 1);
        for (name, value) in others() {
            writer.str(name);
            writer.raw(value);
        }
        writer.str(key);
        writer.str(text);
        writer.bytes.into()
    }
}
