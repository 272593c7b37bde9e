//! What stands in the frames that requests travel in: Submit, Cancel, Step, and the beats between them.

use bytes::{Buf, BufMut, BytesMut};

use super::{FrameError, Kind, message, put, put_message, short, take_u32};
use crate::proto::worker;

/// Appends a Submit: the stream, then the request.
pub fn put_submit(buf: &mut BytesMut, stream: u32, request: &worker::GenerateRequest) {
    put(buf, Kind::Submit, |buf| {
        buf.put_u32_le(stream);
        put_message(buf, request);
    });
}

/// Reads the payload of a Submit. Prompts share memory with `payload` where it is [`Bytes`](bytes::Bytes).
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn submit(mut payload: impl Buf) -> Result<(u32, worker::GenerateRequest), FrameError> {
    let stream = take_u32(Kind::Submit, &mut payload)?;
    Ok((stream, message(Kind::Submit, payload)?))
}

/// Appends a Cancel.
pub fn put_cancel(buf: &mut BytesMut, stream: u32) {
    put(buf, Kind::Cancel, |buf| buf.put_u32_le(stream));
}

/// Reads the payload of a Cancel.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn cancel(mut payload: &[u8]) -> Result<u32, FrameError> {
    take_u32(Kind::Cancel, &mut payload)
}

/// Appends a Step.
pub fn put_step(buf: &mut BytesMut, step: &worker::StepDeltas) {
    put(buf, Kind::Step, |buf| put_message(buf, step));
}

/// Appends a Ping or Pong with the number that links them.
pub fn put_beat(buf: &mut BytesMut, kind: Kind, number: u64) {
    put(buf, kind, |buf| buf.put_u64_le(number));
}

/// Reads the payload of a Ping or Pong.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn beat(kind: Kind, payload: &[u8]) -> Result<u64, FrameError> {
    match payload.first_chunk::<8>() {
        Some(number) => Ok(u64::from_le_bytes(*number)),
        None => Err(short(kind)),
    }
}

/// Appends a Draining.
pub fn put_draining(buf: &mut BytesMut) {
    put(buf, Kind::Draining, |_| {});
}
