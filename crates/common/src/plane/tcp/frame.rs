//! The bytes of the tcp plane: `u32 LE length | u8 kind | payload`, where the length counts kind
//! and payload. No I/O and no state; `proto/README.md` has the table.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::{
    ids::BlobHash,
    proto::{plane, worker},
};

/// Peers of another major version refuse each other.
pub const MAJOR: u16 = 1;

/// Counts additions that an older peer of the same major version may skip.
pub const MINOR: u16 = 0;

/// What a connection begins with, so that a stray HTTP client is told apart at once.
pub const MAGIC: [u8; 6] = *b"STATOR";

/// Bytes of length and kind.
pub const HEADER: usize = 5;

/// The largest frame: a prompt of a million tokens is 4 MiB, a step of 1,024 streams with 20
/// log-probabilities each about 256 KiB; what is larger than this is a defect or an attack.
pub const MAX_FRAME: usize = 64 << 20;

/// The largest frame before a peer has said Hello.
pub const MAX_HELLO: usize = 4 << 10;

/// Blob bytes per frame: small enough that a step waits less than a millisecond behind one.
pub const BLOB_CHUNK: usize = 64 << 10;

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

/// Appends a Submit: the stream, then the request.
pub fn put_submit(buf: &mut BytesMut, stream: u32, request: &worker::GenerateRequest) {
    put(buf, Kind::Submit, |buf| {
        buf.put_u32_le(stream);
        put_message(buf, request);
    });
}

/// Reads the payload of a Submit. Prompts share memory with `payload` where it is [`Bytes`].
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

/// Appends a BlobRequest: a number for the answer, then the hash as text.
pub fn put_blob_request(buf: &mut BytesMut, number: u32, hash: &BlobHash) {
    put(buf, Kind::BlobRequest, |buf| {
        buf.put_u32_le(number);
        buf.put_slice(hash.0.as_bytes());
    });
}

/// Reads the payload of a BlobRequest.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn blob_request(mut payload: &[u8]) -> Result<(u32, BlobHash), FrameError> {
    let number = take_u32(Kind::BlobRequest, &mut payload)?;
    let hash = std::str::from_utf8(payload).map_err(|error| FrameError::Malformed {
        kind: Kind::BlobRequest,
        reason: error.to_string(),
    })?;
    Ok((number, BlobHash(hash.to_owned())))
}

/// A piece of a blob.
#[derive(Debug, PartialEq, Eq)]
pub struct BlobChunk<'a> {
    /// The request that this answers.
    pub number: u32,
    /// What follows.
    pub part: BlobPart,
    /// The bytes; none with [`BlobPart::Missing`].
    pub bytes: &'a [u8],
}

/// What follows a piece of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobPart {
    /// More pieces.
    More,
    /// Nothing; the blob is complete.
    Last,
    /// Nothing; there is no such blob.
    Missing,
}

/// Appends a Blob frame.
pub fn put_blob(buf: &mut BytesMut, chunk: &BlobChunk<'_>) {
    put(buf, Kind::Blob, |buf| {
        buf.put_u32_le(chunk.number);
        buf.put_u8(match chunk.part {
            BlobPart::More => 0,
            BlobPart::Last => 1,
            BlobPart::Missing => 2,
        });
        buf.put_slice(chunk.bytes);
    });
}

/// Reads the payload of a Blob frame.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn blob(mut payload: &[u8]) -> Result<BlobChunk<'_>, FrameError> {
    let number = take_u32(Kind::Blob, &mut payload)?;
    let Some((&part, bytes)) = payload.split_first() else {
        return Err(short(Kind::Blob));
    };
    let part = match part {
        0 => BlobPart::More,
        1 => BlobPart::Last,
        2 => BlobPart::Missing,
        other => {
            return Err(FrameError::Malformed {
                kind: Kind::Blob,
                reason: format!("unknown part {other}"),
            });
        }
    };
    Ok(BlobChunk {
        number,
        part,
        bytes,
    })
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

fn take_u32(kind: Kind, payload: &mut impl Buf) -> Result<u32, FrameError> {
    payload.try_get_u32_le().map_err(|_| short(kind))
}

fn short(kind: Kind) -> FrameError {
    FrameError::Malformed {
        kind,
        reason: "too short".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads every frame of `bytes` the way both ends do.
    fn read_all(bytes: &[u8]) -> Result<usize, FrameError> {
        let mut buf = BytesMut::from(bytes);
        let mut frames = 0;
        while let Some(header) = peek(&buf, MAX_FRAME)? {
            let payload = take(&mut buf, header);
            match header.kind {
                Some(Kind::Hello | Kind::Welcome | Kind::Reject) => {
                    introduction(&payload)?;
                }
                Some(Kind::Submit) => {
                    submit(payload)?;
                }
                Some(Kind::Cancel) => {
                    cancel(&payload)?;
                }
                Some(kind @ Kind::Step) => {
                    message::<worker::StepDeltas>(kind, &payload[..])?;
                }
                Some(kind @ (Kind::Ping | Kind::Pong)) => {
                    beat(kind, &payload)?;
                }
                Some(Kind::BlobRequest) => {
                    blob_request(&payload)?;
                }
                Some(Kind::Blob) => {
                    blob(&payload)?;
                }
                Some(Kind::Draining) | None => {}
            }
            frames += 1;
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = read_all(&bytes);
        }

        #[test]
        fn arbitrary_payloads_of_every_kind_never_panic(
            kind in 0_u8..16,
            payload in proptest::collection::vec(any::<u8>(), 0..256),
        ) {
            let mut bytes = u32::try_from(payload.len() + 1).unwrap().to_le_bytes().to_vec();
            bytes.push(kind);
            bytes.extend_from_slice(&payload);
            let _ = read_all(&bytes);
        }

        #[test]
        fn a_frame_cut_anywhere_waits_for_the_rest(stream: u32, cut in 0_usize..9) {
            let mut buf = BytesMut::new();
            put_cancel(&mut buf, stream);
            prop_assert_eq!(buf.len(), 9);
            prop_assert_eq!(peek(&buf[..cut], MAX_FRAME).unwrap(), None);
            let header = peek(&buf, MAX_FRAME).unwrap().unwrap();
            prop_assert_eq!(header.kind, Some(Kind::Cancel));
            prop_assert_eq!(cancel(&take(&mut buf, header)).unwrap(), stream);
        }

        #[test]
        fn a_submit_reads_back(stream: u32, prompt in proptest::collection::vec(any::<u8>(), 0..512)) {
            let request = worker::GenerateRequest {
                request_id: "r".into(),
                prompt_tokens: prompt.into(),
                ..Default::default()
            };
            let mut buf = BytesMut::new();
            put_submit(&mut buf, stream, &request);
            let header = peek(&buf, MAX_FRAME).unwrap().unwrap();
            prop_assert_eq!(submit(take(&mut buf, header)).unwrap(), (stream, request));
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        let error = peek(&u32::MAX.to_le_bytes(), MAX_FRAME).unwrap_err();
        assert_eq!(
            error,
            FrameError::TooLarge {
                size: u32::MAX as usize,
                limit: MAX_FRAME
            }
        );
    }

    #[test]
    fn a_frame_of_an_unknown_kind_can_be_skipped() {
        let mut buf = BytesMut::from(&[3, 0, 0, 0, 200, 1, 2][..]);
        put_cancel(&mut buf, 7);
        assert_eq!(read_all(&buf).unwrap(), 2);
    }

    #[test]
    fn http_is_not_mistaken_for_a_peer() {
        assert!(matches!(
            peek(b"GET / HTTP/1.1\r\n", MAX_HELLO),
            Err(FrameError::TooLarge { .. })
        ));
    }
}
