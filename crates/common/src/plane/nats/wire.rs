//! The messages of a pipe, as bytes. All integers are little-endian; the story is in `proto/README.md`.

use bytes::{BufMut, Bytes, BytesMut};

/// Of the protocol. The form of [`Opening`] up to the version never changes.
pub(super) const VERSION: u8 = 1;

/// What an opening begins with, after its kind.
const MAGIC: &[u8; 6] = b"STATOR";

/// Bytes of a message before those that it carries.
pub(super) const HEADER: usize = 17;

const OPEN: u8 = 1;
const ACCEPT: u8 = 2;
const DATA: u8 = 3;
const CLOSE: u8 = 4;

/// What introduces an end of a pipe to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    /// Open, of who dials. Else Accept, of who listens.
    pub(super) asks: bool,
    pub(super) version: u8,
    /// What the other end may send before it is read; see [`super::pipe`].
    pub(super) window: u32,
}

impl Opening {
    pub(super) fn encode(self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(1 + MAGIC.len() + 5);
        bytes.put_u8(if self.asks { OPEN } else { ACCEPT });
        bytes.put_slice(MAGIC);
        bytes.put_u8(self.version);
        bytes.put_u32_le(self.window);
        bytes.freeze()
    }

    /// Reads one; `None` if it is none of ours.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        let rest = rest.strip_prefix(MAGIC)?;
        let (&version, rest) = rest.split_first()?;
        let (window, _) = rest.split_first_chunk()?;
        let asks = match kind {
            OPEN => true,
            ACCEPT => false,
            _ => return None,
        };
        Some(Self {
            asks,
            version,
            window: u32::from_le_bytes(*window),
        })
    }
}

/// A message of an open pipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// Nothing follows it.
    pub(super) last: bool,
    /// Of this direction, from 0, one by one.
    pub(super) number: u64,
    /// How much its sender has read of the other direction.
    pub(super) read: u64,
    /// May be empty.
    pub(super) bytes: Bytes,
}

impl Packet {
    pub(super) fn encode(last: bool, number: u64, read: u64, data: &[u8]) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEADER + data.len());
        bytes.put_u8(if last { CLOSE } else { DATA });
        bytes.put_u64_le(number);
        bytes.put_u64_le(read);
        bytes.put_slice(data);
        bytes.freeze()
    }

    /// Reads one, sharing its memory; `None` if it is none of ours.
    pub(super) fn decode(mut message: Bytes) -> Option<Self> {
        if message.len() < HEADER {
            return None;
        }
        let header = message.split_to(HEADER);
        let (&kind, rest) = header.split_first()?;
        let (number, rest) = rest.split_first_chunk()?;
        let (read, _) = rest.split_first_chunk()?;
        let last = match kind {
            DATA => false,
            CLOSE => true,
            _ => return None,
        };
        Some(Self {
            last,
            number: u64::from_le_bytes(*number),
            read: u64::from_le_bytes(*read),
            bytes: message,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(last: bool, number: u64, read: u64, data: Vec<u8>) {
            let packet = Packet::decode(Packet::encode(last, number, read, &data));
            prop_assert_eq!(packet, Some(Packet { last, number, read, bytes: data.into() }));
        }

        #[test]
        fn any_bytes_can_be_read_without_harm(bytes: Vec<u8>) {
            let _ = Opening::decode(&bytes);
            let _ = Packet::decode(bytes.into());
        }
    }

    #[test]
    fn an_opening_reads_back_and_may_grow() {
        let opening = Opening {
            asks: true,
            version: 7,
            window: 1 << 20,
        };
        let mut bytes = BytesMut::from(&opening.encode()[..]);
        bytes.put_slice(b"of a later version");
        assert_eq!(Opening::decode(&bytes), Some(opening));
    }
}
