//! The Hermes format: `<tool_call>{"name": .., "arguments": ..}</tool_call>`, with or without line breaks.
//!
//! Read here and not by the parser crate, because clients see how vLLM 0.32 reads it
//! (`tool_parsers/hermes_tool_parser.py`): a stream shows the arguments as the model writes them, whatever
//! JSON they are, and nothing of the text after the first call; a complete answer with one malformed call has
//! none. The start of a tag at the end of a stream is never shown, be it the start of a call or, in a text that
//! breaks off there, of nothing. Each character is looked at once, where vLLM looks at the whole answer for every token.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{NewId, ParsedDelta, ToolCall, ToolCallDelta, call_id};
use crate::markers::Guard;
use crate::python_json;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The state within one answer.
#[derive(Debug)]
pub(super) struct Hermes {
    guard: Guard,
    /// The call that is being written.
    call: Option<Call>,
    /// Calls before it.
    count: usize,
}

impl Hermes {
    pub(super) fn new() -> Self {
        Self {
            guard: Guard::new(vec![OPEN, CLOSE]),
            call: None,
            count: 0,
        }
    }

    pub(super) fn push(&mut self, text: &str, new_id: &mut NewId<'_>) -> ParsedDelta {
        let text = self.guard.push(text);
        let mut all = ParsedDelta::default();
        self.read(&text, &mut all, new_id);
        all.merge();
        all
    }

    pub(super) fn finish(&mut self, new_id: &mut NewId<'_>) -> ParsedDelta {
        let held = self.guard.finish();
        let mut all = ParsedDelta::default();
        // The start of an opening tag is text of the arguments that it stands in.
        if self.call.is_some() && !CLOSE.starts_with(&held) {
            self.read(&held, &mut all, new_id);
        }
        all
    }

    fn read(&mut self, mut text: &str, all: &mut ParsedDelta, new_id: &mut NewId<'_>) {
        while !text.is_empty() {
            let Some(call) = &mut self.call else {
                let open = text.find(OPEN);
                if self.count == 0 {
                    all.text.push_str(&text[..open.unwrap_or(text.len())]);
                }
                let Some(open) = open else { return };
                text = &text[open + OPEN.len()..];
                self.call = Some(Call::default());
                continue;
            };
            let close = text.find(CLOSE);
            call.push(&text[..close.unwrap_or(text.len())]);
            all.calls
                .extend(call.news(self.count, close.is_some(), new_id));
            let Some(close) = close else { return };
            text = &text[close + CLOSE.len()..];
            self.call = None;
            self.count += 1;
        }
    }
}

/// One call, as far as it was written.
#[derive(Debug, Default)]
struct Call {
    /// What stands between the tags, without white space in front.
    json: String,
    announced: bool,
    /// Where the arguments begin.
    arguments: Option<usize>,
    /// Where the arguments that were given out end.
    given: usize,
    nesting: Nesting,
}

impl Call {
    fn push(&mut self, text: &str) {
        let text = match self.json.is_empty() {
            true => text.trim_start(),
            false => text,
        };
        self.nesting.push(text);
        self.json.push_str(text);
    }

    /// Returns what can be told now and was not told before.
    fn news(
        &mut self,
        index: usize,
        closed: bool,
        new_id: &mut NewId<'_>,
    ) -> Option<ToolCallDelta> {
        let mut delta = ToolCallDelta {
            index,
            id: None,
            name: None,
            arguments: String::new(),
        };
        if !self.announced {
            let name = value_of(&self.json, "\"name\"")?;
            let name = self.json[name..].strip_prefix('"')?;
            let name = &name[..name.find('"').filter(|end| *end > 0)?];
            delta.id = Some(call_id(new_id));
            delta.name = Some(name.to_owned());
            self.announced = true;
        }
        if self.arguments.is_none() {
            self.arguments = value_of(&self.json, "\"arguments\"");
            self.given = self.arguments.unwrap_or_default();
        }
        if self.arguments.is_some() {
            let mut end = self.json.trim_end();
            if closed || self.is_complete() {
                // The last brace is the call's, not the arguments'.
                end = end.strip_suffix('}').unwrap_or(end).trim_end();
            }
            if end.len() > self.given {
                delta.arguments.push_str(&end[self.given..]);
                self.given = end.len();
            }
        }
        (delta.name.is_some() || !delta.arguments.is_empty()).then_some(delta)
    }
}

impl Call {
    /// Says whether what was written is JSON already, without the closing tag.
    fn is_complete(&self) -> bool {
        let json = || serde_json::from_str::<serde::de::IgnoredAny>(&self.json);
        self.nesting.is_closed() && json().is_ok()
    }
}

/// Returns where the value of a key begins, once it has begun.
fn value_of(json: &str, key: &str) -> Option<usize> {
    json.match_indices(key).find_map(|(at, key)| {
        let rest = json[at + key.len()..].trim_start().strip_prefix(':')?;
        let value = rest.trim_start();
        (!value.is_empty()).then(|| json.len() - value.len())
    })
}

/// How deep the JSON text read so far is nested.
#[derive(Debug, Default)]
struct Nesting {
    depth: usize,
    begun: bool,
    /// Something follows the outermost object.
    left: bool,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            self.left |= self.is_closed() && !byte.is_ascii_whitespace();
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => {
                    self.depth += 1;
                    self.begun = true;
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }

    /// Says whether the text ends with the outermost object.
    fn is_closed(&self) -> bool {
        self.begun && self.depth == 0 && !self.left
    }
}

/// Returns the text and the calls of a complete answer.
pub(super) fn parse_complete(answer: &str, new_id: &mut NewId<'_>) -> (String, Vec<ToolCall>) {
    let Some(first) = answer.find(OPEN) else {
        return (answer.to_owned(), Vec::new());
    };
    #[derive(Deserialize)]
    struct Written<'a> {
        name: String,
        // Raw, because a number may be larger than any that Rust knows.
        #[serde(borrow)]
        arguments: &'a RawValue,
    }
    let mut rest = &answer[first..];
    let mut calls = Vec::new();
    while let Some(open) = rest.find(OPEN) {
        let body = &rest[open + OPEN.len()..];
        let close = body.find(CLOSE);
        let written = serde_json::from_str(&body[..close.unwrap_or(body.len())]).ok();
        let call = written.and_then(|Written { name, arguments }| {
            let arguments = python_json::rewrite(arguments.get())?;
            Some((name, arguments))
        });
        let Some((name, arguments)) = call else {
            return (answer.to_owned(), Vec::new());
        };
        calls.push(ToolCall {
            id: call_id(new_id),
            name,
            arguments,
        });
        rest = close.map_or("", |close| &body[close + CLOSE.len()..]);
    }
    (answer[..first].to_owned(), calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams an answer in pieces of `size` characters; returns its text, and names and arguments.
    fn stream(answer: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut hermes = Hermes::new();
        let chars: Vec<char> = answer.chars().collect();
        let mut deltas: Vec<ParsedDelta> = chars
            .chunks(size)
            .map(|piece| hermes.push(&piece.iter().collect::<String>(), &mut || 1))
            .collect();
        deltas.push(hermes.finish(&mut || 1));
        let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for delta in deltas {
            text.push_str(&delta.text);
            for call in delta.calls {
                match call.name {
                    Some(name) => calls.push((name, call.arguments)),
                    None => calls[call.index].1.push_str(&call.arguments),
                }
            }
        }
        (text, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn a_stream_shows_arguments_as_they_are_written() {
        let answer = "Well.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\":1, \"y\": \"}\\\"\"}}\n</tool_call>\n\
                      between <tool_call>{\"arguments\":12e3, \"name\":\"b\"}</tool_call> after";
        for size in [1, 2, 3, 5, 8, 1000] {
            let (text, calls) = stream(answer, size);
            assert_eq!(text, "Well.\n", "{size}");
            assert_eq!(calls[0], call("a", "{\"x\":1, \"y\": \"}\\\"\"}"), "{size}");
            // vLLM takes everything behind the key, too.
            assert_eq!(calls[1], call("b", "12e3, \"name\":\"b\""), "{size}");
        }
    }

    #[test]
    fn an_answer_that_breaks_off_has_the_call_so_far() {
        for size in [1, 4, 1000] {
            let (text, calls) = stream(
                "<tool_call>{\"name\": \"a\", \"arguments\": {\"x\": \"lon",
                size,
            );
            assert_eq!(
                (text.as_str(), &calls[..]),
                ("", &[call("a", "{\"x\": \"lon")][..])
            );
            let done =
                "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call><tool_call>{\"na";
            assert_eq!(stream(done, size), (String::new(), vec![call("a", "{}")]));
            let closing = "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_ca";
            assert_eq!(
                stream(closing, size),
                (String::new(), vec![call("a", "{}")])
            );
        }
    }

    #[test]
    fn a_complete_answer_has_all_its_calls_or_none() {
        let good = "x <tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\":1e999,\"y\":[1,2]}}\n</tool_call>\
                    <tool_call>{\"name\":\"b\",\"arguments\":{\"k\":\"\\u00e9\"}}";
        let (text, calls) = parse_complete(good, &mut || 1);
        assert_eq!(text, "x ");
        let calls: Vec<_> = calls.iter().map(|call| call.arguments.as_str()).collect();
        assert_eq!(
            calls,
            ["{\"x\": Infinity, \"y\": [1, 2]}", "{\"k\": \"é\"}"]
        );
        let bad = "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call><tool_call>{\"na";
        assert_eq!(parse_complete(bad, &mut || 1), (bad.to_owned(), Vec::new()));
    }
}
