//! Checks hand-off parameters, the one thing that is spliced into a request unread.

use super::read::{Reader, WireError};

/// Levels of maps and arrays; connectors use four (block ids per group).
const MAX_NESTING: usize = 32;

/// Why hand-off parameters cannot be passed on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParamsError {
    #[error("not msgpack: {0}")]
    Wire(#[from] WireError),
    #[error("not one map with string keys")]
    NotAMap,
    #[error("holds an extension value, which the engine would not decode")]
    Extension,
}

/// Checks that bytes are one map that the engine decodes: an unknown extension, a broken string
/// or a key that cannot be hashed would end the thread that reads requests.
pub(crate) fn check_params(bytes: &[u8]) -> Result<(), ParamsError> {
    use rmp::Marker as M;
    let mut reader = Reader::new(bytes);
    if !matches!(reader.peek()?, M::FixMap(_) | M::Map16 | M::Map32) {
        return Err(ParamsError::NotAMap);
    }
    value(&mut reader, MAX_NESTING)?;
    match reader.remaining() {
        0 => Ok(()),
        size => Err(WireError::Trailing { size }.into()),
    }
}

fn value(reader: &mut Reader<'_>, depth: usize) -> Result<(), ParamsError> {
    use rmp::Marker as M;
    let depth = depth
        .checked_sub(1)
        .ok_or(WireError::TooDeep { limit: MAX_NESTING })?;
    match reader.peek()? {
        M::FixStr(_) | M::Str8 | M::Str16 | M::Str32 => drop(reader.str("a string")?),
        M::FixArray(_) | M::Array16 | M::Array32 => {
            for _ in 0..reader.array()? {
                value(reader, depth)?;
            }
        }
        M::FixMap(_) | M::Map16 | M::Map32 => {
            for _ in 0..reader.map()? {
                if !matches!(reader.peek()?, M::FixStr(_) | M::Str8 | M::Str16 | M::Str32) {
                    return Err(ParamsError::NotAMap);
                }
                value(reader, depth)?;
                value(reader, depth)?;
            }
        }
        M::Reserved
        | M::FixExt1
        | M::FixExt2
        | M::FixExt4
        | M::FixExt8
        | M::FixExt16
        | M::Ext8
        | M::Ext16
        | M::Ext32 => return Err(ParamsError::Extension),
        _ => drop(reader.skip()?),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_map_with_lists_passes_and_anything_the_engine_chokes_on_does_not() {
        // {"a": [1, nil, {"b": true}]}
        let good = b"\x81\xa1a\x93\x01\xc0\x81\xa1b\xc3";
        assert_eq!(check_params(good), Ok(()));
        for (bad, what) in [
            (&b"\x93\x01\x02\x03"[..], "an array"),
            (b"\x81\x01\x02", "an integer key"),
            (b"\x81\xa1a\xd4\x05\x00", "an extension"),
            (b"\x81\xa1a\xa1\xff", "broken UTF-8"),
            (b"\x81\xa1a", "a truncated map"),
            (b"\x80\xc0", "a value too many"),
            (b"\xc1", "the unused marker"),
            (b"", "nothing"),
        ] {
            assert!(check_params(bad).is_err(), "{what}");
        }
        let mut deep = b"\x81\xa1a".to_vec();
        deep.extend([0x91; 100]);
        deep.push(0xc0);
        assert!(check_params(&deep).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = check_params(&bytes);
        }
    }
}
