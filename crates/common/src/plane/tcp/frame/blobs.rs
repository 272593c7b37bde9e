//! What stands in the frames that files travel in: BlobRequest and Blob.

use bytes::{BufMut, BytesMut};

use super::{FrameError, Kind, put, short, take_u32};
use crate::ids::BlobHash;

/// Blob bytes per frame: small enough that a step waits less than a millisecond behind one.
pub const BLOB_CHUNK: usize = 64 << 10;

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
