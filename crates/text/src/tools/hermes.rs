//! Puts the tags of the Hermes format on lines of their own, which is where the parser crate looks for them.
//!
//! Models write `<tool_call>{...}</tool_call>` as well, and vLLM takes both.

use crate::markers::Guard;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The state within one answer.
#[derive(Debug)]
pub(super) struct HermesLines {
    guard: Guard,
    in_call: bool,
    /// After an opening tag: white space is left out.
    skip_space: bool,
    /// White space within a call that stands before the closing tag, or else belongs to it.
    space: String,
}

impl HermesLines {
    pub(super) fn new() -> Self {
        Self {
            guard: Guard::new(vec![OPEN, CLOSE]),
            in_call: false,
            skip_space: false,
            space: String::new(),
        }
    }

    pub(super) fn push(&mut self, text: &str) -> String {
        let text = self.guard.push(text);
        self.align(&text)
    }

    pub(super) fn finish(&mut self) -> String {
        let rest = self.guard.finish();
        self.align(&rest) + &std::mem::take(&mut self.space)
    }

    fn align(&mut self, mut text: &str) -> String {
        let mut out = String::with_capacity(text.len() + 2);
        loop {
            let open = text.find(OPEN);
            let close = text.find(CLOSE);
            let tag = match (open, close) {
                (Some(open), close) if close.is_none_or(|close| open < close) => Some((open, OPEN)),
                (_, Some(close)) => Some((close, CLOSE)),
                _ => None,
            };
            self.plain(&text[..tag.map_or(text.len(), |(at, _)| at)], &mut out);
            let Some((at, tag)) = tag else { return out };
            if tag == OPEN {
                out.push_str(&std::mem::take(&mut self.space));
                out.push_str("<tool_call>\n");
            } else {
                self.space.clear();
                out.push_str("\n</tool_call>");
            }
            self.in_call = tag == OPEN;
            self.skip_space = self.in_call;
            text = &text[at + tag.len()..];
        }
    }

    fn plain(&mut self, mut text: &str, out: &mut String) {
        if self.skip_space {
            text = text.trim_start();
            if text.is_empty() {
                return;
            }
            self.skip_space = false;
        }
        let solid = if self.in_call { text.trim_end() } else { text };
        if !solid.is_empty() {
            out.push_str(&std::mem::take(&mut self.space));
            out.push_str(solid);
        }
        self.space.push_str(&text[solid.len()..]);
    }
}
