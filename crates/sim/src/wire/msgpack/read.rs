//! Bytes to values.

use rmp::Marker;

use super::Value;

/// How deep arrays and maps may nest.
const MAX_DEPTH: u32 = 64;

/// Why bytes are no msgpack, or not the msgpack that was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("message ends inside a value at byte {0}")]
    Truncated(usize),
    #[error("expected {expected} at byte {at}")]
    Unexpected { expected: &'static str, at: usize },
    #[error("values nest deeper than {MAX_DEPTH}")]
    TooDeep,
    #[error("text is not UTF-8 at byte {0}")]
    NotUtf8(usize),
}

/// Reads values one after the other.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0 }
    }

    /// The next value, whole.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn value(&mut self) -> Result<Value, DecodeError> {
        self.value_at(0)
    }

    /// The length of an array whose elements follow.
    ///
    /// # Errors
    /// [`DecodeError`], also for anything but an array.
    pub fn array(&mut self) -> Result<usize, DecodeError> {
        let at = self.at;
        match self.marker()? {
            Marker::FixArray(len) => Ok(usize::from(len)),
            Marker::Array16 => self.number(2).map(|n| n as usize),
            Marker::Array32 => self.number(4).map(|n| n as usize),
            _ => Err(DecodeError::Unexpected {
                expected: "an array",
                at,
            }),
        }
    }

    /// An array of token ids, or `None` for nil.
    ///
    /// # Errors
    /// [`DecodeError`], also for elements that are no token ids.
    pub fn tokens(&mut self) -> Result<Option<Vec<u32>>, DecodeError> {
        if self.data.get(self.at) == Some(&0xc0) {
            self.at += 1;
            return Ok(None);
        }
        let len = self.array()?;
        // A token takes at least a byte, so a length beyond the message is a lie.
        let mut tokens = Vec::with_capacity(len.min(self.data.len()));
        for _ in 0..len {
            let at = self.at;
            let token = match self.marker()? {
                Marker::FixPos(value) => u64::from(value),
                Marker::U8 => self.number(1)?,
                Marker::U16 => self.number(2)?,
                Marker::U32 => self.number(4)?,
                _ => {
                    self.at = at;
                    self.value()?.as_u64().unwrap_or(u64::MAX)
                }
            };
            tokens.push(u32::try_from(token).map_err(|_| DecodeError::Unexpected {
                expected: "a token id",
                at,
            })?);
        }
        Ok(Some(tokens))
    }

    fn value_at(&mut self, depth: u32) -> Result<Value, DecodeError> {
        if depth > MAX_DEPTH {
            return Err(DecodeError::TooDeep);
        }
        let at = self.at;
        Ok(match self.marker()? {
            Marker::Null => Value::Nil,
            Marker::True => Value::Bool(true),
            Marker::False => Value::Bool(false),
            Marker::FixPos(value) => Value::Int(i64::from(value)),
            Marker::FixNeg(value) => Value::Int(i64::from(value)),
            Marker::U8 => Value::from(self.number(1)?),
            Marker::U16 => Value::from(self.number(2)?),
            Marker::U32 => Value::from(self.number(4)?),
            Marker::U64 => Value::from(self.number(8)?),
            Marker::I8 => Value::Int(i64::from(self.number(1)? as i8)),
            Marker::I16 => Value::Int(i64::from(self.number(2)? as i16)),
            Marker::I32 => Value::Int(i64::from(self.number(4)? as i32)),
            Marker::I64 => Value::Int(self.number(8)? as i64),
            Marker::F32 => Value::Float(f64::from(f32::from_bits(self.number(4)? as u32))),
            Marker::F64 => Value::Float(f64::from_bits(self.number(8)?)),
            Marker::FixStr(len) => self.text(usize::from(len))?,
            Marker::Str8 => self.sized(1, Self::text)?,
            Marker::Str16 => self.sized(2, Self::text)?,
            Marker::Str32 => self.sized(4, Self::text)?,
            Marker::Bin8 => self.sized(1, Self::bin)?,
            Marker::Bin16 => self.sized(2, Self::bin)?,
            Marker::Bin32 => self.sized(4, Self::bin)?,
            Marker::FixArray(len) => self.values(usize::from(len), depth)?,
            Marker::Array16 => self.sized(2, |r, len| r.values(len, depth))?,
            Marker::Array32 => self.sized(4, |r, len| r.values(len, depth))?,
            Marker::FixMap(len) => self.entries(usize::from(len), depth)?,
            Marker::Map16 => self.sized(2, |r, len| r.entries(len, depth))?,
            Marker::Map32 => self.sized(4, |r, len| r.entries(len, depth))?,
            Marker::FixExt1 => self.ext(1)?,
            Marker::FixExt2 => self.ext(2)?,
            Marker::FixExt4 => self.ext(4)?,
            Marker::FixExt8 => self.ext(8)?,
            Marker::FixExt16 => self.ext(16)?,
            Marker::Ext8 => self.sized(1, Self::ext)?,
            Marker::Ext16 => self.sized(2, Self::ext)?,
            Marker::Ext32 => self.sized(4, Self::ext)?,
            Marker::Reserved => {
                return Err(DecodeError::Unexpected {
                    expected: "a value",
                    at,
                });
            }
        })
    }

    fn marker(&mut self) -> Result<Marker, DecodeError> {
        Ok(Marker::from_u8(self.bytes(1)?[0]))
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let bytes = self
            .at
            .checked_add(len)
            .and_then(|end| self.data.get(self.at..end))
            .ok_or(DecodeError::Truncated(self.at))?;
        self.at += len;
        Ok(bytes)
    }

    fn number(&mut self, width: usize) -> Result<u64, DecodeError> {
        Ok(self
            .bytes(width)?
            .iter()
            .fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn sized<T>(
        &mut self,
        width: usize,
        read: impl FnOnce(&mut Self, usize) -> Result<T, DecodeError>,
    ) -> Result<T, DecodeError> {
        let len = self.number(width)? as usize;
        read(self, len)
    }

    fn text(&mut self, len: usize) -> Result<Value, DecodeError> {
        let at = self.at;
        let text = std::str::from_utf8(self.bytes(len)?).map_err(|_| DecodeError::NotUtf8(at))?;
        Ok(Value::from(text))
    }

    fn bin(&mut self, len: usize) -> Result<Value, DecodeError> {
        Ok(Value::Bin(self.bytes(len)?.to_vec()))
    }

    fn ext(&mut self, len: usize) -> Result<Value, DecodeError> {
        let kind = self.number(1)? as i8;
        Ok(Value::Ext(kind, self.bytes(len)?.to_vec()))
    }

    fn values(&mut self, len: usize, depth: u32) -> Result<Value, DecodeError> {
        let mut values = Vec::with_capacity(len.min(self.data.len() - self.at));
        for _ in 0..len {
            values.push(self.value_at(depth + 1)?);
        }
        Ok(Value::Array(values))
    }

    fn entries(&mut self, len: usize, depth: u32) -> Result<Value, DecodeError> {
        let mut entries = Vec::with_capacity(len.min(self.data.len() - self.at));
        for _ in 0..len {
            entries.push((self.value_at(depth + 1)?, self.value_at(depth + 1)?));
        }
        Ok(Value::Map(entries))
    }
}

/// Reads a message that is one value.
///
/// # Errors
/// [`DecodeError`].
pub fn decode(data: &[u8]) -> Result<Value, DecodeError> {
    Reader::new(data).value()
}
