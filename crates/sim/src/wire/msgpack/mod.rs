//! Just enough msgpack for the engine's side of the wire: a value, a reader and a writer.
//!
//! The engine crate has a codec of its own, which this one must not share: each is the other's
//! test.

mod read;
mod value;
mod write;

pub use read::{DecodeError, Reader, decode};
pub use value::Value;
pub use write::{array, bin, bool, ext, float, int, map, nil, nils, str, uint};

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
