//! What subjects are made of.

use std::fmt::Write as _;

/// Returns a subject that nobody else has.
///
/// - `kind`: what it is for, a part of a subject.
pub(crate) fn fresh(kind: &str) -> String {
    format!("stator.{kind}.{:032x}", rand::random::<u128>())
}

/// Returns a text as one part of a subject: letters, digits, `-` and `_` stay, others become `=` and their code, so that
/// different texts stay different.
pub fn token(text: &str) -> String {
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => token.push(byte.into()),
            // Writing into a string does not fail.
            _ => drop(write!(token, "={byte:02x}")),
        }
    }
    if token.is_empty() {
        "=".to_owned()
    } else {
        token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_part_and_tells_texts_apart() {
        assert_eq!(token("agg-0a_B"), "agg-0a_B");
        assert_eq!(token("a.b*>"), "a=2eb=2a=3e");
        assert_eq!(token(""), "=");
        assert_ne!(token("a=2e"), token("a."));
        assert_ne!(fresh("pipe"), fresh("pipe"));
    }
}
