//! Walks msgpack in place: every read is bounds-checked, nothing is allocated, nothing panics.
//!
//! Why not serde: `rmp-serde` wants arrays of the length that it knows, and the engine's arrays
//! grow with every release. Walking also makes fields that nobody reads cost one `skip`.

use rmp::Marker;

/// Why bytes are not the message that they should be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    #[error("message ends at byte {at}, inside a value")]
    Truncated { at: usize },
    #[error("expected {expected} at byte {at}, found {found:?}")]
    Unexpected {
        at: usize,
        expected: &'static str,
        found: Marker,
    },
    #[error("{what} is not valid UTF-8")]
    Utf8 { what: &'static str },
    #[error("number at byte {at} does not fit {expected}")]
    Range { at: usize, expected: &'static str },
    #[error("value is nested deeper than {limit} levels")]
    TooDeep { limit: usize },
    #[error("{size} bytes follow the message")]
    Trailing { size: usize },
    #[error("{message} lacks its field `{field}`")]
    Missing {
        message: &'static str,
        field: &'static str,
    },
    #[error("message has no frames")]
    NoFrames,
    #[error("tensor: {0}")]
    Tensor(#[from] TensorError),
}

/// Why a tensor cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("dtype `{0}` is not one that is read here")]
    Dtype(String),
    #[error("its data is frame {index} of {frames}")]
    NoFrame { index: u64, frames: usize },
    #[error("{bytes} bytes of data for {elements} elements of {size} bytes")]
    Size {
        bytes: usize,
        elements: usize,
        size: usize,
    },
    #[error("its data is not in the message (tensor IPC)")]
    OutOfBand,
    #[error("shapes of token ids, values and ranks do not agree")]
    Shapes,
}

/// The byte that most fields of most outputs are.
const NIL: u8 = 0xc0;

/// A cursor over one frame.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    #[inline]
    fn take(&mut self, size: usize) -> Result<&'a [u8], WireError> {
        let bytes = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.get(..size))
            .ok_or(WireError::Truncated { at: self.at })?;
        self.at += size;
        Ok(bytes)
    }

    #[inline]
    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let bytes = self.take(N)?;
        bytes
            .try_into()
            .map_err(|_| WireError::Truncated { at: self.at })
    }

    fn be(&mut self, width: usize) -> Result<u64, WireError> {
        Ok(self
            .take(width)?
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    #[inline]
    pub(crate) fn peek(&self) -> Result<Marker, WireError> {
        self.bytes
            .get(self.at)
            .map(|byte| Marker::from_u8(*byte))
            .ok_or(WireError::Truncated { at: self.at })
    }

    #[inline]
    fn marker(&mut self) -> Result<Marker, WireError> {
        let marker = self.peek()?;
        self.at += 1;
        Ok(marker)
    }

    fn unexpected<T>(
        &self,
        at: usize,
        expected: &'static str,
        found: Marker,
    ) -> Result<T, WireError> {
        Err(WireError::Unexpected {
            at,
            expected,
            found,
        })
    }

    /// Consumes a nil if one is next.
    #[inline]
    pub(crate) fn nil(&mut self) -> Result<bool, WireError> {
        match self.bytes.get(self.at) {
            Some(byte) => {
                let nil = *byte == NIL;
                self.at += usize::from(nil);
                Ok(nil)
            }
            None => Err(WireError::Truncated { at: self.at }),
        }
    }

    /// Reads an array's length. Each element takes a byte at least, so a length beyond the
    /// message is refused here and may size an allocation.
    #[inline]
    pub(crate) fn array(&mut self) -> Result<usize, WireError> {
        let at = self.at;
        let len = match self.marker()? {
            Marker::FixArray(len) => usize::from(len),
            Marker::Array16 => self.be(2)? as usize,
            Marker::Array32 => self.be(4)? as usize,
            found => return self.unexpected(at, "an array", found),
        };
        if len > self.remaining() {
            return Err(WireError::Truncated {
                at: self.bytes.len(),
            });
        }
        Ok(len)
    }

    /// Reads a map's length, in pairs.
    pub(crate) fn map(&mut self) -> Result<usize, WireError> {
        let at = self.at;
        let len = match self.marker()? {
            Marker::FixMap(len) => usize::from(len),
            Marker::Map16 => self.be(2)? as usize,
            Marker::Map32 => self.be(4)? as usize,
            found => return self.unexpected(at, "a map", found),
        };
        if len > self.remaining() / 2 {
            return Err(WireError::Truncated {
                at: self.bytes.len(),
            });
        }
        Ok(len)
    }

    /// Reads any integer.
    #[inline]
    pub(crate) fn int(&mut self) -> Result<i128, WireError> {
        let at = self.at;
        Ok(match self.marker()? {
            Marker::FixPos(value) => i128::from(value),
            Marker::FixNeg(value) => i128::from(value),
            Marker::U8 => i128::from(self.take_array::<1>()?[0]),
            Marker::U16 => i128::from(u16::from_be_bytes(self.take_array()?)),
            Marker::U32 => i128::from(u32::from_be_bytes(self.take_array()?)),
            Marker::U64 => i128::from(u64::from_be_bytes(self.take_array()?)),
            Marker::I8 => i128::from(i8::from_be_bytes(self.take_array()?)),
            Marker::I16 => i128::from(i16::from_be_bytes(self.take_array()?)),
            Marker::I32 => i128::from(i32::from_be_bytes(self.take_array()?)),
            Marker::I64 => i128::from(i64::from_be_bytes(self.take_array()?)),
            found => return self.unexpected(at, "an integer", found),
        })
    }

    /// Reads an integer that must fit `T`.
    #[inline]
    pub(crate) fn number<T: TryFrom<i128>>(
        &mut self,
        expected: &'static str,
    ) -> Result<T, WireError> {
        let at = self.at;
        T::try_from(self.int()?).map_err(|_| WireError::Range { at, expected })
    }

    /// Reads an unsigned 32-bit integer: the short forms, which token ids have, without a detour.
    #[inline]
    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        match &self.bytes[self.at..] {
            [value @ 0..0x80, ..] => {
                self.at += 1;
                Ok(u32::from(*value))
            }
            [0xcc, value, ..] => {
                self.at += 2;
                Ok(u32::from(*value))
            }
            [0xcd, a, b, ..] => {
                self.at += 3;
                Ok(u32::from(u16::from_be_bytes([*a, *b])))
            }
            [0xce, a, b, c, d, ..] => {
                self.at += 5;
                Ok(u32::from_be_bytes([*a, *b, *c, *d]))
            }
            _ => self.number("an unsigned 32-bit integer"),
        }
    }

    /// Reads a float; an integer is taken as one, as msgspec does.
    pub(crate) fn f64(&mut self) -> Result<f64, WireError> {
        match self.peek()? {
            Marker::F64 => {
                self.at += 1;
                Ok(f64::from_be_bytes(self.take_array()?))
            }
            Marker::F32 => {
                self.at += 1;
                Ok(f64::from(f32::from_be_bytes(self.take_array()?)))
            }
            _ => Ok(self.int()? as f64),
        }
    }

    pub(crate) fn bool(&mut self) -> Result<bool, WireError> {
        let at = self.at;
        match self.marker()? {
            Marker::True => Ok(true),
            Marker::False => Ok(false),
            found => self.unexpected(at, "a boolean", found),
        }
    }

    /// Reads a string without looking at its encoding.
    #[inline]
    pub(crate) fn str_bytes(&mut self) -> Result<&'a [u8], WireError> {
        let at = self.at;
        let len = match self.marker()? {
            Marker::FixStr(len) => usize::from(len),
            Marker::Str8 => self.be(1)? as usize,
            Marker::Str16 => self.be(2)? as usize,
            Marker::Str32 => self.be(4)? as usize,
            found => return self.unexpected(at, "a string", found),
        };
        self.take(len)
    }

    pub(crate) fn str(&mut self, what: &'static str) -> Result<&'a str, WireError> {
        std::str::from_utf8(self.str_bytes()?).map_err(|_| WireError::Utf8 { what })
    }

    /// Reads the payload of a binary value or of an extension.
    pub(crate) fn blob(&mut self) -> Result<&'a [u8], WireError> {
        let at = self.at;
        let (len, ext) = match self.marker()? {
            Marker::Bin8 => (self.be(1)? as usize, false),
            Marker::Bin16 => (self.be(2)? as usize, false),
            Marker::Bin32 => (self.be(4)? as usize, false),
            Marker::FixExt1 => (1, true),
            Marker::FixExt2 => (2, true),
            Marker::FixExt4 => (4, true),
            Marker::FixExt8 => (8, true),
            Marker::FixExt16 => (16, true),
            Marker::Ext8 => (self.be(1)? as usize, true),
            Marker::Ext16 => (self.be(2)? as usize, true),
            Marker::Ext32 => (self.be(4)? as usize, true),
            found => return self.unexpected(at, "binary data", found),
        };
        if ext {
            self.take(1)?;
        }
        self.take(len)
    }

    /// Passes over one value, however deep, and returns its bytes.
    #[inline]
    pub(crate) fn skip(&mut self) -> Result<&'a [u8], WireError> {
        let start = self.at;
        // Values still to pass over. No recursion, so depth costs nothing; every round takes a
        // byte at least, so a lying length ends the loop with the message.
        let mut left = 1u64;
        while left > 0 {
            left -= 1;
            match self.peek()? {
                Marker::Null
                | Marker::True
                | Marker::False
                | Marker::FixPos(_)
                | Marker::FixNeg(_)
                | Marker::Reserved => self.at += 1,
                Marker::U8 | Marker::I8 => drop(self.take(2)?),
                Marker::U16 | Marker::I16 => drop(self.take(3)?),
                Marker::U32 | Marker::I32 | Marker::F32 => drop(self.take(5)?),
                Marker::U64 | Marker::I64 | Marker::F64 => drop(self.take(9)?),
                Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                    self.str_bytes()?;
                }
                Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                    left += self.array()? as u64;
                }
                Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => {
                    left += 2 * self.map()? as u64;
                }
                Marker::Bin8
                | Marker::Bin16
                | Marker::Bin32
                | Marker::FixExt1
                | Marker::FixExt2
                | Marker::FixExt4
                | Marker::FixExt8
                | Marker::FixExt16
                | Marker::Ext8
                | Marker::Ext16
                | Marker::Ext32 => {
                    self.blob()?;
                }
            }
        }
        Ok(&self.bytes[start..self.at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::new(&bytes);
            while reader.skip().is_ok() {}
            for read in [
                |r: &mut Reader<'_>| r.int().is_ok(),
                |r: &mut Reader<'_>| r.f64().is_ok(),
                |r: &mut Reader<'_>| r.bool().is_ok(),
                |r: &mut Reader<'_>| r.str("x").is_ok(),
                |r: &mut Reader<'_>| r.blob().is_ok(),
                |r: &mut Reader<'_>| r.array().is_ok(),
                |r: &mut Reader<'_>| r.map().is_ok(),
            ] {
                read(&mut Reader::new(&bytes));
            }
        }
    }

    #[test]
    fn a_million_nested_arrays_are_skipped_without_recursion() {
        let mut bytes = vec![0x91; 1_000_000];
        bytes.push(0xc0);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.skip().map(<[u8]>::len), Ok(1_000_001));
    }

    #[test]
    fn an_array_that_claims_more_than_the_message_is_truncated() {
        let mut reader = Reader::new(&[0xdd, 0xff, 0xff, 0xff, 0xff, 0x00]);
        assert_eq!(reader.array(), Err(WireError::Truncated { at: 6 }));
    }
}
