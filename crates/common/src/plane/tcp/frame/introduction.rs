//! How two peers introduce themselves: Hello, Welcome and Reject, of which every version can read the start.

use bytes::{Buf, BufMut, BytesMut};
use prost::Message;

use super::{FrameError, Kind, put, put_message};
use crate::proto::{plane, worker};

/// Peers of another major version refuse each other.
pub const MAJOR: u16 = 1;

/// Counts additions that an older peer of the same major version may skip.
pub const MINOR: u16 = 1;

/// What a connection begins with, so that a stray HTTP client is told apart at once.
pub const MAGIC: [u8; 6] = *b"STATOR";

/// Appends a Hello.
pub fn put_hello(buf: &mut BytesMut, hello: &plane::Hello) {
    put_introduction(buf, Kind::Hello, (MAJOR, MINOR), hello);
}

/// Appends a Welcome.
pub fn put_welcome(buf: &mut BytesMut, welcome: &plane::Welcome) {
    put_introduction(buf, Kind::Welcome, (MAJOR, MINOR), welcome);
}

/// Appends a Reject.
pub fn put_reject(buf: &mut BytesMut, error: &worker::Error) {
    put_introduction(buf, Kind::Reject, (MAJOR, MINOR), error);
}

/// Magic and version come before the message and never change, so that peers of any two versions can
/// tell each other which they are.
pub(crate) fn put_introduction(
    buf: &mut BytesMut,
    kind: Kind,
    (major, minor): (u16, u16),
    message: &impl Message,
) {
    put(buf, kind, |buf| {
        buf.put_slice(&MAGIC);
        buf.put_u16_le(major);
        buf.put_u16_le(minor);
        put_message(buf, message);
    });
}

/// The peer's version, and its message as bytes that only the same major version can read.
#[derive(Debug)]
pub struct Introduction<'a> {
    pub major: u16,
    pub minor: u16,
    pub message: &'a [u8],
}

/// Reads the payload of a Hello, Welcome or Reject.
///
/// # Errors
/// [`FrameError::NotStator`].
pub fn introduction(mut payload: &[u8]) -> Result<Introduction<'_>, FrameError> {
    if payload.len() < MAGIC.len() + 4 || payload[..MAGIC.len()] != MAGIC {
        return Err(FrameError::NotStator);
    }
    payload.advance(MAGIC.len());
    Ok(Introduction {
        major: payload.get_u16_le(),
        minor: payload.get_u16_le(),
        message: payload,
    })
}
