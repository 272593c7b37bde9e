//! Writing JSON by hand, where a tree of values would cost more than the text.

use bytes::{BufMut, BytesMut};

/// Appends text as a JSON string, quotes included.
pub(crate) fn string(out: &mut BytesMut, text: &str) {
    write(out, text);
}

/// Appends a number.
pub(crate) fn number(out: &mut BytesMut, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends a finite number.
pub(crate) fn float(out: &mut BytesMut, value: f64) {
    write(out, &value);
}

/// Appends what `value` serializes to. Anything that always serializes: strings, numbers, lists of them.
pub(crate) fn write<T: serde::Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    serde_json::to_writer(out.writer(), value)
        .expect("a buffer grows, and the value serializes to JSON");
}

/// Appends text as it is.
pub(crate) fn raw(out: &mut BytesMut, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

/// Appends a list, each element written by `element`.
pub(crate) fn list<T>(
    out: &mut BytesMut,
    items: impl IntoIterator<Item = T>,
    mut element: impl FnMut(&mut BytesMut, T),
) {
    out.put_u8(b'[');
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            out.put_u8(b',');
        }
        element(out, item);
    }
    out.put_u8(b']');
}
