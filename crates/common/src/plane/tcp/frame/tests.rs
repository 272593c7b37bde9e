use proptest::prelude::*;

use super::*;
use crate::proto::worker;

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
