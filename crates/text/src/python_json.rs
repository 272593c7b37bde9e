//! JSON with the spacing of Python's `json.dumps`, made of JSON in any spacing, in pieces.
//!
//! vLLM passes the arguments of tool calls through `json.dumps`, so `{"a": 1, "b": 2}` is what its clients see,
//! and what a model sees of its own calls in the next turn. The parser crate writes none of these spaces.

/// The state within one JSON text.
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
}
