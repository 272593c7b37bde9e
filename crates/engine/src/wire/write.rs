//! Writes msgpack into a growing buffer, which cannot fail.

use rmp::encode as rmp;

const INFALLIBLE: &str = "writing into a Vec cannot fail";

/// A msgpack message under construction.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pub(crate) bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn with_capacity(size: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(size),
        }
    }

    pub(crate) fn nil(&mut self) {
        rmp::write_nil(&mut self.bytes).expect(INFALLIBLE);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        rmp::write_bool(&mut self.bytes, value).expect(INFALLIBLE);
    }

    pub(crate) fn uint(&mut self, value: u64) {
        rmp::write_uint(&mut self.bytes, value).expect(INFALLIBLE);
    }

    pub(crate) fn int(&mut self, value: i64) {
        rmp::write_sint(&mut self.bytes, value).expect(INFALLIBLE);
    }

    pub(crate) fn f64(&mut self, value: f64) {
        rmp::write_f64(&mut self.bytes, value).expect(INFALLIBLE);
    }

    pub(crate) fn str(&mut self, value: &str) {
        rmp::write_str(&mut self.bytes, value).expect(INFALLIBLE);
    }

    pub(crate) fn array(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a request has less than 2^32 elements");
        rmp::write_array_len(&mut self.bytes, len).expect(INFALLIBLE);
    }

    pub(crate) fn map(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a request has less than 2^32 elements");
        rmp::write_map_len(&mut self.bytes, len).expect(INFALLIBLE);
    }

    /// Appends bytes that are msgpack already.
    pub(crate) fn raw(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
    }

    /// Writes token ids, by hand: a prompt has up to a million.
    pub(crate) fn ids(&mut self, ids: impl ExactSizeIterator<Item = u32>) {
        self.array(ids.len());
        for id in ids {
            let [a, b, c, d] = id.to_be_bytes();
            match id {
                0..0x80 => self.bytes.push(d),
                0x80..0x100 => self.bytes.extend_from_slice(&[0xcc, d]),
                0x100..0x1_0000 => self.bytes.extend_from_slice(&[0xcd, c, d]),
                _ => self.bytes.extend_from_slice(&[0xce, a, b, c, d]),
            }
        }
    }

    pub(crate) fn json(&mut self, value: &serde_json::Value) {
        match value {
            serde_json::Value::Null => self.nil(),
            serde_json::Value::Bool(value) => self.bool(*value),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => self.int(value),
                (None, Some(value)) => self.uint(value),
                (None, None) => self.f64(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(value) => self.str(value),
            serde_json::Value::Array(values) => {
                self.array(values.len());
                values.iter().for_each(|value| self.json(value));
            }
            serde_json::Value::Object(entries) => {
                self.map(entries.len());
                for (key, value) in entries {
                    self.str(key);
                    self.json(value);
                }
            }
        }
    }
}
