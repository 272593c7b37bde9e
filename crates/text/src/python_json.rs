//! JSON as Python's `json.dumps` writes it.
//!
//! vLLM passes the arguments of tool calls through `json.dumps`, so `{"a": 1, "b": 2}` is what its clients see,
//! and what a model sees of its own calls in the next turn. The parser crate writes none of these spaces.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Levels of objects and lists that are written anew, as many as serde_json reads.
const MAX_DEPTH: usize = 128;
/// Digits of an integer that Python reads (`sys.int_info.default_max_str_digits`).
const MAX_DIGITS: usize = 4300;

/// Returns what `json.dumps(json.loads(json), ensure_ascii=False)` is in Python; `None` if that fails.
///
/// Integers keep all their digits, and of a key that comes twice the last value counts.
pub fn rewrite(json: &str) -> Option<String> {
    let json: &RawValue = serde_json::from_str(json).ok()?;
    let mut out = String::with_capacity(json.get().len() + 16);
    write(json.get(), 0, &mut out)?;
    Some(out)
}

/// Writes one value, of which no more is known than that it is JSON.
fn write(json: &str, depth: usize, out: &mut String) -> Option<()> {
    if depth > MAX_DEPTH {
        return None;
    }
    match json.as_bytes().first()? {
        b'{' => {
            let Entries(entries) = serde_json::from_str(json).ok()?;
            out.push('{');
            for (index, (key, value)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                out.push_str(&serde_json::to_string(key).ok()?);
                out.push_str(": ");
                write(value.get(), depth + 1, out)?;
            }
            out.push('}');
        }
        b'[' => {
            let items: Vec<&RawValue> = serde_json::from_str(json).ok()?;
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write(item.get(), depth + 1, out)?;
            }
            out.push(']');
        }
        b'"' => {
            let text: String = serde_json::from_str(json).ok()?;
            out.push_str(&serde_json::to_string(&text).ok()?);
        }
        b'-' | b'0'..=b'9' => write_number(json, out)?,
        _ => out.push_str(json),
    }
    Some(())
}

fn write_number(json: &str, out: &mut String) -> Option<()> {
    if json.contains(['.', 'e', 'E']) {
        out.push_str(&python_float(json.parse().ok()?));
    } else if json == "-0" {
        out.push('0');
    } else if json.len() - usize::from(json.starts_with('-')) <= MAX_DIGITS {
        out.push_str(json);
    } else {
        return None;
    }
    Some(())
}

/// The fields of an object in the order in which their keys came first.
struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries: Vec<(String, &RawValue)> = Vec::new();
                let mut places: HashMap<String, usize> = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
                    match places.get(&key) {
                        Some(place) => entries[*place].1 = value,
                        None => {
                            places.insert(key.clone(), entries.len());
                            entries.push((key, value));
                        }
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// Gives JSON the spacing of `json.dumps`, in pieces: the state within one JSON text.
#[derive(Debug, Default)]
pub(crate) struct PythonJson {
    in_string: bool,
    escaped: bool,
}

impl PythonJson {
    /// Returns the next piece, respaced.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        let mut out = String::with_capacity(piece.len() + 8);
        for c in piece.chars() {
            if self.in_string {
                out.push(c);
                match c {
                    _ if self.escaped => self.escaped = false,
                    '\\' => self.escaped = true,
                    '"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match c {
                ' ' | '\n' | '\r' | '\t' => {}
                ',' | ':' => {
                    out.push(c);
                    out.push(' ');
                }
                c => {
                    self.in_string = c == '"';
                    out.push(c);
                }
            }
        }
        out
    }
}

/// Writes a float as Python's `repr` does: the shortest digits that read back, with an exponent below 1e-4 and
/// from 1e16.
pub(crate) fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let magnitude = number.abs();
    if number == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{number:?}");
    }
    let text = format!("{number:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spacing_is_pythons_wherever_the_pieces_end() {
        let json = r#"{"a":1,"b": ["x, y:\"z\" \\", {"c" :null}] }"#;
        let wanted = r#"{"a": 1, "b": ["x, y:\"z\" \\", {"c": null}]}"#;
        for size in 1..json.len() {
            let mut state = PythonJson::default();
            let pieces = json.as_bytes().chunks(size);
            let text: String = pieces
                .map(|piece| state.push(std::str::from_utf8(piece).unwrap()))
                .collect();
            assert_eq!(text, wanted);
        }
    }

    #[test]
    fn floats_look_as_in_python() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456_789.125, "123456789.125"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
        ];
        for (number, text) in cases {
            assert_eq!(python_float(number), text);
        }
    }

    #[test]
    fn a_value_is_written_as_python_writes_what_it_read() {
        for (json, written) in [
            (r#"{"a":1,"b" : [ ], "a":2}"#, r#"{"a": 2, "b": []}"#),
            (
                "[1.0,1e22,1E-7,-0,-0.0,1.50e3]",
                "[1.0, 1e+22, 1e-07, 0, -0.0, 1500.0]",
            ),
            (
                "123456789012345678901234567890",
                "123456789012345678901234567890",
            ),
            ("1888556e55661024100806", "Infinity"),
            (
                r#""\u00fc\/\ud83d\ude00\u0001\u007f""#,
                "\"ü/😀\\u0001\u{7f}\"",
            ),
            (" null ", "null"),
        ] {
            assert_eq!(rewrite(json).as_deref(), Some(written), "{json}");
        }
        let digits = "1".repeat(4301);
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        for json in ["{", "[1,]", "1 2", "", digits.as_str(), deep.as_str()] {
            assert_eq!(rewrite(json), None, "{json}");
        }
    }
}
