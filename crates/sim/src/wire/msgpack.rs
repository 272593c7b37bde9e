//! Just enough msgpack for the engine's side of the wire: a value, a reader and a writer.
//!
//! The engine crate has a codec of its own, which this one must not share: each is the other's
//! test.

use rmp::Marker;

/// How deep arrays and maps may nest.
const MAX_DEPTH: u32 = 64;

/// Any msgpack value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Nil,
    Bool(bool),
    Int(i64),
    /// Integers above `i64::MAX`.
    UInt(u64),
    Float(f64),
    Str(String),
    Bin(Vec<u8>),
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Ext(i8, Vec<u8>),
}

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

impl Value {
    #[must_use]
    pub fn is_nil(&self) -> bool {
        matches!(self, Self::Nil)
    }

    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// A number that is not negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Int(value) => u64::try_from(*value).ok(),
            Self::UInt(value) => Some(*value),
            _ => None,
        }
    }

    /// A token id.
    #[must_use]
    pub fn as_u32(&self) -> Option<u32> {
        self.as_u64().and_then(|value| u32::try_from(value).ok())
    }

    /// A float, or an integer where a float is meant.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Int(value) => Some(*value as f64),
            Self::UInt(value) => Some(*value as f64),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(value) => Some(value),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }

    #[must_use]
    pub fn as_map(&self) -> Option<&[(Value, Value)]> {
        match self {
            Self::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// The entry of a map under a text key; nil counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_map()?
            .iter()
            .find(|(name, _)| name.as_str() == Some(key))
            .map(|(_, value)| value)
            .filter(|value| !value.is_nil())
    }

    /// A map with text keys.
    #[must_use]
    pub fn map<const N: usize>(entries: [(&str, Value); N]) -> Self {
        Self::Map(
            entries
                .into_iter()
                .map(|(key, value)| (Self::from(key), value))
                .collect(),
        )
    }

    /// Appends the value as msgpack.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Nil => nil(out),
            Self::Bool(value) => bool(out, *value),
            Self::Int(value) => int(out, *value),
            Self::UInt(value) => uint(out, *value),
            Self::Float(value) => float(out, *value),
            Self::Str(value) => str(out, value),
            Self::Bin(value) => {
                infallible(rmp::encode::write_bin(out, value));
            }
            Self::Array(values) => {
                array(out, values.len());
                for value in values {
                    value.write(out);
                }
            }
            Self::Map(entries) => {
                map(out, entries.len());
                for (key, value) in entries {
                    key.write(out);
                    value.write(out);
                }
            }
            Self::Ext(kind, data) => ext(out, *kind, data),
        }
    }

    /// The value as msgpack.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Str(value.to_owned())
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(i64::from(value))
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::from(value as u64)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        i64::try_from(value).map_or(Self::UInt(value), Self::Int)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Nil, Into::into)
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(values: Vec<T>) -> Self {
        Self::Array(values.into_iter().map(Into::into).collect())
    }
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

fn infallible<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.expect("a vector takes every write")
}

/// Appends nil.
pub fn nil(out: &mut Vec<u8>) {
    infallible(rmp::encode::write_nil(out));
}

/// Appends `count` nils.
pub fn nils(out: &mut Vec<u8>, count: usize) {
    for _ in 0..count {
        nil(out);
    }
}

/// Appends a boolean.
pub fn bool(out: &mut Vec<u8>, value: bool) {
    infallible(rmp::encode::write_bool(out, value));
}

/// Appends a signed integer in its shortest form.
pub fn int(out: &mut Vec<u8>, value: i64) {
    infallible(rmp::encode::write_sint(out, value));
}

/// Appends an unsigned integer in its shortest form.
pub fn uint(out: &mut Vec<u8>, value: u64) {
    infallible(rmp::encode::write_uint(out, value));
}

/// Appends a double.
pub fn float(out: &mut Vec<u8>, value: f64) {
    infallible(rmp::encode::write_f64(out, value));
}

/// Appends text.
pub fn str(out: &mut Vec<u8>, value: &str) {
    infallible(rmp::encode::write_str(out, value));
}

/// Appends the head of an array of `len` elements.
pub fn array(out: &mut Vec<u8>, len: usize) {
    infallible(rmp::encode::write_array_len(out, len as u32));
}

/// Appends the head of a map of `len` entries.
pub fn map(out: &mut Vec<u8>, len: usize) {
    infallible(rmp::encode::write_map_len(out, len as u32));
}

/// Appends an extension value.
pub fn ext(out: &mut Vec<u8>, kind: i8, data: &[u8]) {
    infallible(rmp::encode::write_ext_meta(out, data.len() as u32, kind));
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            (1u64 << 63..).prop_map(Value::UInt),
            any::<i32>().prop_map(|value| Value::Float(f64::from(value) / 8.0)),
            ".{0,40}".prop_map(Value::Str),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(Value::Bin),
            (any::<i8>(), proptest::collection::vec(any::<u8>(), 0..20))
                .prop_map(|(kind, data)| Value::Ext(kind, data)),
        ];
        leaf.prop_recursive(3, 40, 20, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..20).prop_map(Value::Array),
                proptest::collection::vec((inner.clone(), inner), 0..20).prop_map(Value::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in any_value()) {
            prop_assert_eq!(decode(&value.to_vec()).unwrap(), value);
        }

        #[test]
        fn no_bytes_are_worse_than_an_error(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&data);
            let _ = Reader::new(&data).tokens();
        }
    }

    #[test]
    fn tokens_come_in_every_width() {
        let value = Value::from(vec![1u32, 200, 60_000, 100_000]);
        assert_eq!(
            Reader::new(&value.to_vec()).tokens().unwrap(),
            Some(vec![1, 200, 60_000, 100_000])
        );
        assert_eq!(Reader::new(&[0xc0]).tokens().unwrap(), None);
        assert!(
            Reader::new(&Value::Array(vec![Value::Int(-1)]).to_vec())
                .tokens()
                .is_err()
        );
    }
}
