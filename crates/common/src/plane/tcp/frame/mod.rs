//! The bytes of the tcp plane: `u32 LE length | u8 kind | payload`, where the length counts kind
//! and payload. No I/O and no state; `proto/README.md` has the table.
//!
//! This file says where a frame begins and ends; what stands in it, by kind, its submodules.

mod blobs;
mod introduction;
mod streams;
#[cfg(test)]
mod tests;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

pub use blobs::*;
pub use introduction::*;
pub use streams::*;

/// Bytes of length and kind.
pub const HEADER: usize = 5;

/// The largest frame: a prompt of a million tokens is 4 MiB, a step of 1,024 streams with 20
/// log-probabilities each about 256 KiB; what is larger than this is a defect or an attack.
pub const MAX_FRAME: usize = 64 << 20;

/// The largest frame before a peer has said Hello.
pub const MAX_HELLO: usize = 4 << 10;

/// What a frame is. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Reject = 3,
    Submit = 4,
    Cancel = 5,
    Step = 6,
    Ping = 7,
    Pong = 8,
    Draining = 9,
    BlobRequest = 10,
    Blob = 11,
}

impl Kind {
    /// Returns the kind of a number; absent for one that a newer peer may have added.
    pub fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Reject,
            4 => Self::Submit,
            5 => Self::Cancel,
            6 => Self::Step,
            7 => Self::Ping,
            8 => Self::Pong,
            9 => Self::Draining,
            10 => Self::BlobRequest,
            11 => Self::Blob,
            _ => return None,
        })
    }
}

/// Why bytes are not a frame. Each of these ends the connection.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {size} bytes is larger than allowed ({limit})")]
    TooLarge { size: usize, limit: usize },
    #[error("a frame without a kind")]
    Empty,
    #[error("the peer does not speak this protocol")]
    NotStator,
    #[error("malformed {kind:?} frame: {reason}")]
    Malformed { kind: Kind, reason: String },
    #[error("a {kind:?} frame where none may come")]
    Unexpected { kind: Kind },
}

/// The first bytes of a frame that has arrived in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Absent: a kind that this build does not know, to be skipped.
    pub kind: Option<Kind>,
    /// Bytes after the header.
    pub payload: usize,
}

/// Says whether a whole frame is at the front of `buf`, and which.
///
/// # Errors
/// [`FrameError::TooLarge`] as soon as the length has arrived, [`FrameError::Empty`].
pub fn peek(buf: &[u8], limit: usize) -> Result<Option<Header>, FrameError> {
    let Some((length, rest)) = buf.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let size = u32::from_le_bytes(*length) as usize;
    if size > limit {
        return Err(FrameError::TooLarge { size, limit });
    }
    if size == 0 {
        return Err(FrameError::Empty);
    }
    if rest.len() < size {
        return Ok(None);
    }
    Ok(Some(Header {
        kind: Kind::from_wire(rest[0]),
        payload: size - 1,
    }))
}

/// Appends a frame whose payload `body` writes.
pub fn put(buf: &mut BytesMut, kind: Kind, body: impl FnOnce(&mut BytesMut)) {
    let start = buf.len();
    buf.put_u32_le(0);
    buf.put_u8(kind as u8);
    body(buf);
    let size = u32::try_from(buf.len() - start - 4).expect("frames are checked to be below 4 GiB");
    buf[start..start + 4].copy_from_slice(&size.to_le_bytes());
}

fn put_message(buf: &mut BytesMut, message: &impl Message) {
    message
        .encode(buf)
        .expect("a BytesMut grows, so a message always fits");
}

/// Decodes the message of a frame.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn message<M: Message + Default>(kind: Kind, payload: impl Buf) -> Result<M, FrameError> {
    M::decode(payload).map_err(|error| FrameError::Malformed {
        kind,
        reason: error.to_string(),
    })
}

/// Takes the payload of the frame at the front of `buf`, header included, out of it.
pub fn take(buf: &mut BytesMut, header: Header) -> Bytes {
    buf.advance(HEADER);
    buf.split_to(header.payload).freeze()
}

/// Returns the payload of the frame at the front of `buf`, which stays there.
pub fn payload(buf: &[u8], header: Header) -> &[u8] {
    &buf[HEADER..HEADER + header.payload]
}

/// Takes the frame at the front of `buf` out of it.
pub fn skip(buf: &mut BytesMut, header: Header) {
    buf.advance(HEADER + header.payload);
}

fn take_u32(kind: Kind, payload: &mut impl Buf) -> Result<u32, FrameError> {
    payload.try_get_u32_le().map_err(|_| short(kind))
}

fn short(kind: Kind) -> FrameError {
    FrameError::Malformed {
        kind,
        reason: "too short".to_owned(),
    }
}
