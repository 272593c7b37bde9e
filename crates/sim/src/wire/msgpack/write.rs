//! Values to bytes.

fn infallible<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.expect("a vector takes every write")
}

/// Appends nil.
pub fn nil(out: &mut Vec<u8>) {
    infallible(rmp::encode::write_nil(out));
}

/// Appends `count` nils.
pub fn nils(out: &mut Vec<u8>, count: usize) {
    for _ in 0..count {
        nil(out);
    }
}

/// Appends a boolean.
pub fn bool(out: &mut Vec<u8>, value: bool) {
    infallible(rmp::encode::write_bool(out, value));
}

/// Appends a signed integer in its shortest form.
pub fn int(out: &mut Vec<u8>, value: i64) {
    infallible(rmp::encode::write_sint(out, value));
}

/// Appends an unsigned integer in its shortest form.
pub fn uint(out: &mut Vec<u8>, value: u64) {
    infallible(rmp::encode::write_uint(out, value));
}

/// Appends a double.
pub fn float(out: &mut Vec<u8>, value: f64) {
    infallible(rmp::encode::write_f64(out, value));
}

/// Appends text.
pub fn str(out: &mut Vec<u8>, value: &str) {
    infallible(rmp::encode::write_str(out, value));
}

/// Appends the head of an array of `len` elements.
pub fn array(out: &mut Vec<u8>, len: usize) {
    infallible(rmp::encode::write_array_len(out, len as u32));
}

/// Appends the head of a map of `len` entries.
pub fn map(out: &mut Vec<u8>, len: usize) {
    infallible(rmp::encode::write_map_len(out, len as u32));
}

/// Appends bytes.
pub fn bin(out: &mut Vec<u8>, value: &[u8]) {
    infallible(rmp::encode::write_bin(out, value));
}

/// Appends an extension value.
pub fn ext(out: &mut Vec<u8>, kind: i8, data: &[u8]) {
    infallible(rmp::encode::write_ext_meta(out, data.len() as u32, kind));
    out.extend_from_slice(data);
}
