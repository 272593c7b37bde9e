//! Reads a JSON list of calls while it is being written.
//!
//! The answer to `tool_choice: "required"` is a list of `{"name": .., "parameters": ..}`. A call is
//! announced once its name is complete and its parameters have begun; from then on each piece of the
//! parameters is passed on as it is. As vLLM (0.32, `tool_parsers/streaming.py`), but each character is
//! looked at once.

use std::collections::HashMap;

use serde_json::value::RawValue;
use stator_text::python_json;

use super::reader::CallDelta;

/// Reads a complete list; one that is not complete, or no list of calls, has none.
///
/// - `key`: what a call's arguments are called.
pub(super) fn whole(text: &str, key: &str) -> Vec<CallDelta> {
    let calls: Vec<HashMap<String, &RawValue>> = serde_json::from_str(text).unwrap_or_default();
    let delta = |(index, call): (usize, HashMap<String, &RawValue>)| {
        let name: String = serde_json::from_str(call.get("name")?.get()).ok()?;
        let arguments = call.get(key).map_or("null", |arguments| arguments.get());
        if arguments != "null" && !arguments.starts_with('{') {
            return None;
        }
        Some(CallDelta {
            index,
            id: None,
            name: Some(name),
            arguments: Some(python_json::rewrite(arguments)?),
        })
    };
    let calls: Option<Vec<CallDelta>> = calls.into_iter().enumerate().map(delta).collect();
    calls.unwrap_or_default()
}

/// The state between two pieces of text.
#[derive(Debug)]
pub(super) struct Listed {
    /// What a call's arguments are called.
    arguments_key: &'static str,
    /// Nesting of objects and lists: 1 within the list, 2 within a call.
    depth: usize,
    in_string: bool,
    escaped: bool,
    expect: Expect,
    key: String,
    /// The raw text of the string that is being read, where it is needed: a key or the name.
    raw: String,
    name: Option<String>,
    /// What was read of the parameters and not passed on.
    arguments: String,
    /// Within the value of `parameters`.
    in_arguments: bool,
    has_arguments: bool,
    /// Whether the current call was announced.
    announced: bool,
    /// Calls announced.
    count: usize,
    ended: bool,
}

/// What may come next within a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Key,
    Colon,
    Value,
    InString,
    InContainer,
    InScalar,
    AfterValue,
}

impl Listed {
    /// - `arguments_key`: what a call's arguments are called.
    pub(super) fn new(arguments_key: &'static str) -> Self {
        Self {
            arguments_key,
            depth: 0,
            in_string: false,
            escaped: false,
            expect: Expect::default(),
            key: String::new(),
            raw: String::new(),
            name: None,
            arguments: String::new(),
            in_arguments: false,
            has_arguments: false,
            announced: false,
            count: 0,
            ended: false,
        }
    }

    /// Reads on; appends what became certain to `out`.
    pub(super) fn push(&mut self, text: &str, out: &mut Vec<CallDelta>) {
        for c in text.chars() {
            if self.ended {
                return;
            }
            self.char(c, out);
        }
        self.pass_on(out);
    }

    fn char(&mut self, c: char, out: &mut Vec<CallDelta>) {
        if self.in_string {
            self.in_string(c);
            return;
        }
        match c {
            '"' => {
                self.in_string = true;
                self.raw.clear();
                if self.depth == 2 && self.expect == Expect::Value {
                    self.begin_value(Expect::InString);
                }
                self.keep(c);
            }
            '{' | '[' => self.open(c, out),
            '}' | ']' => self.close(c, out),
            _ if self.depth != 2 => self.keep(c),
            ':' if self.expect == Expect::Colon => self.expect = Expect::Value,
            ',' => {
                self.end_value();
                self.expect = Expect::Key;
            }
            c if c.is_whitespace() => {
                if self.expect == Expect::InScalar {
                    self.end_value();
                }
            }
            _ => {
                if self.expect == Expect::Value {
                    self.begin_value(Expect::InScalar);
                }
                self.keep(c);
            }
        }
    }

    fn in_string(&mut self, c: char) {
        self.keep(c);
        if self.escaped {
            self.escaped = false;
        } else if c == '\\' {
            self.escaped = true;
        } else if c == '"' {
            self.in_string = false;
            if self.depth == 2 {
                self.end_string();
            }
            return;
        }
        // Strings within the parameters are passed on, not read.
        if self.depth == 2 && !self.in_arguments {
            self.raw.push(c);
        }
    }

    fn end_string(&mut self) {
        match self.expect {
            Expect::Key => {
                self.key = std::mem::take(&mut self.raw);
                self.expect = Expect::Colon;
            }
            Expect::InString => {
                if self.key == "name" {
                    // A name that is no JSON string never becomes a call.
                    self.name = serde_json::from_str(&format!("\"{}\"", self.raw)).ok();
                }
                self.end_value();
            }
            _ => {}
        }
    }

    fn open(&mut self, c: char, out: &mut Vec<CallDelta>) {
        match self.depth {
            0 if c == '{' => self.ended = true,
            1 if c == '[' => self.ended = true,
            1 => self.begin_call(out),
            2 if self.expect == Expect::Value => self.begin_value(Expect::InContainer),
            _ => {}
        }
        self.keep(c);
        self.depth += 1;
    }

    fn close(&mut self, c: char, out: &mut Vec<CallDelta>) {
        if self.depth == 2 {
            self.end_value();
        }
        self.depth = self.depth.saturating_sub(1);
        self.keep(c);
        match self.depth {
            2 if self.expect == Expect::InContainer => self.end_value(),
            1 => self.pass_on(out),
            0 => self.ended = true,
            _ => {}
        }
    }

    fn begin_call(&mut self, out: &mut Vec<CallDelta>) {
        self.pass_on(out);
        self.expect = Expect::Key;
        self.key.clear();
        self.name = None;
        self.arguments.clear();
        self.has_arguments = false;
        self.announced = false;
    }

    fn begin_value(&mut self, expect: Expect) {
        self.expect = expect;
        if self.key == self.arguments_key {
            self.in_arguments = true;
            self.has_arguments = true;
        }
    }

    fn end_value(&mut self) {
        self.in_arguments = false;
        self.expect = Expect::AfterValue;
    }

    fn keep(&mut self, c: char) {
        if self.in_arguments {
            self.arguments.push(c);
        }
    }

    fn pass_on(&mut self, out: &mut Vec<CallDelta>) {
        if !self.has_arguments {
            return;
        }
        if self.announced {
            if !self.arguments.is_empty() {
                let arguments = Some(std::mem::take(&mut self.arguments));
                out.push(CallDelta {
                    index: self.count - 1,
                    id: None,
                    name: None,
                    arguments,
                });
            }
        } else if let Some(name) = self.name.clone() {
            let arguments = Some(std::mem::take(&mut self.arguments));
            out.push(CallDelta {
                index: self.count,
                id: None,
                name: Some(name),
                arguments,
            });
            self.count += 1;
            self.announced = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `text` in pieces of `size` characters; returns name and arguments of each call.
    fn read(text: &str, size: usize) -> Vec<(String, String)> {
        let mut listed = Listed::new("parameters");
        let mut calls: Vec<(String, String)> = Vec::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(size) {
            let mut out = Vec::new();
            listed.push(&piece.iter().collect::<String>(), &mut out);
            for delta in out {
                match delta.name {
                    Some(name) => {
                        assert_eq!(delta.index, calls.len());
                        calls.push((name, delta.arguments.unwrap()));
                    }
                    None => calls[delta.index].1.push_str(&delta.arguments.unwrap()),
                }
            }
        }
        calls
    }

    #[test]
    fn calls_come_out_the_same_however_the_text_is_cut() {
        let text = r#"[{"name": "a", "parameters": {"x": [1, "}]"], "y\"": {}}}, {"parameters": "s\\\"", "name": "b"},
            {"name": "c", "parameters": 12 }, {"name": "caf\u00e9","parameters":null}]  {"name":"no"}"#;
        let expected = [
            ("a", r#"{"x": [1, "}]"], "y\"": {}}"#),
            ("b", r#""s\\\"""#),
            ("c", "12"),
            ("café", "null"),
        ];
        for size in [1, 2, 3, 7, 1000] {
            let calls = read(text, size);
            let calls: Vec<_> = calls
                .iter()
                .map(|(n, a)| (n.as_str(), a.as_str()))
                .collect();
            assert_eq!(calls, expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_whole_list_is_written_anew_and_a_broken_one_has_no_calls() {
        let calls = whole(
            r#"[{"name":"a","parameters":{"x":[1.0,"\u00e9"],"y":{}}},{"name":"b","parameters":null}]"#,
            "parameters",
        );
        let calls: Vec<_> = calls
            .into_iter()
            .map(|call| call.arguments.unwrap())
            .collect();
        assert_eq!(calls, [r#"{"x": [1.0, "é"], "y": {}}"#, "null"]);
        let calls = whole(r#"[{"name":"a","arguments":{}}]"#, "arguments");
        assert_eq!(calls[0].arguments.as_deref(), Some("{}"));
        for broken in [
            r#"[{"name":"a","param"#,
            r#"[{"name":"a","parameters":3}]"#,
            r#"[{"parameters":{}}]"#,
        ] {
            assert_eq!(whole(broken, "parameters"), []);
        }
    }

    #[test]
    fn a_call_that_breaks_off_is_passed_on_as_far_as_it_came() {
        let cut = r#"[{"name":"a","parameters":{"x":"lon"#;
        assert_eq!(read(cut, 1), [("a".to_owned(), r#"{"x":"lon"#.to_owned())]);
        assert_eq!(read(r#"[{"name":"a"#, 1), []);
        assert_eq!(read(r#"{"name":"a","parameters":{}}"#, 1), []);
        assert_eq!(read("no list at all", 3), []);
    }
}
